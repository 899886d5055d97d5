// Views of weights, caches and batches, and the checks that they make unnecessary later.
#include "views.h"

#include <algorithm>

namespace xds {

using namespace nb::literals;

namespace {

// `index` must be below `count`; `what` names it, `where` says what it would leave.
void check_index(int64_t index, int64_t count, const char* what, const char* where) {
  if (index < count) return;
  fail(std::string(what) + " names " + std::to_string(index) + ", " + where + " (" +
       std::to_string(count) + ")");
}

void init_weight(WeightView* self, Bytes data, int dtype, std::tuple<int64_t, int64_t, int64_t> s) {
  const Weight w = view_weight(data, dtype, std::get<0>(s), std::get<1>(s), std::get<2>(s));
  new (self) WeightView{std::move(data), w};
}

void init_cache(CacheView* self, AnyArray keys, std::optional<AnyArray> values,
                OptionalScales scales) {
  check(values || !scales, "a cache of latents has no scales");
  const Cache cache = values ? view_cache(keys, *values, scales) : view_latents(keys);
  new (self) CacheView{std::move(keys), std::move(values), std::move(scales), cache};
}

int64_t checked_max(const int32_t* values, int64_t count, const char* what) {
  int64_t max = -1;
  for (int64_t i = 0; i < count; ++i) max = std::max<int64_t>(max, values[i]);
  check_range(values, count, 0, max + 1, what);
  return max;
}

// Sequence boundaries, and the blocks that each sequence reads.
void check_context(BatchView& view) {
  const Batch& batch = view.batch;
  check_equal(size(view.query_start, 0), batch.sequences + 1, "length of query_start");
  check_equal(size(view.block_tables, 0), batch.sequences, "number of block tables");
  check_equal(batch.query_start[0], 0, "query_start[0]");
  check_equal(batch.query_start[batch.sequences], batch.tokens, "query_start[-1]");
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int64_t rows = batch.query_start[b + 1] - batch.query_start[b];
    check(rows >= 0, "query_start must not decrease");
    check(batch.seq_lens[b] >= rows, "seq_lens must count the tokens of this step too");
    const int64_t blocks = (batch.seq_lens[b] + view.block_size - 1) / view.block_size;
    check(blocks <= batch.max_blocks, "a block table is too short for its sequence");
    view.max_block = std::max(
        view.max_block, checked_max(batch.block_tables + b * batch.max_blocks,
                                    rows > 0 ? blocks : 0, "block_tables"));
  }
}

void init_batch(BatchView* self, Ints1 query_start, Ints1 seq_lens, Ints2 tables, Ints1 positions,
                Ints1 slots, int64_t block_size) {
  check(block_size >= 1, "block_size must be positive");
  const int64_t tokens = size(positions, 0);
  check_equal(size(slots, 0), tokens, "length of slot_mapping");
  const Batch batch{tokens,          size(seq_lens, 0), size(tables, 1),  query_start.data(),
                    seq_lens.data(), tables.data(),     positions.data(), slots.data()};
  BatchView view{std::move(query_start), std::move(seq_lens), std::move(tables),
                 std::move(positions),   std::move(slots),    block_size, batch};
  check_context(view);
  view.max_slot = checked_max(batch.slots, tokens, "slot_mapping");
  view.max_position = checked_max(batch.positions, tokens, "positions");
  new (self) BatchView(std::move(view));
}

}  // namespace

void check_kind(const Cache& cache, bool latents) {
  check(latents || cache.values != nullptr,
        "this operator needs a value cache; latent caches go with latent attention");
  check(!latents || cache.values == nullptr, "latent attention reads its values from the latents");
}

void check_fits(const BatchView& batch, const Cache& cache) {
  check_equal(cache.block_size, batch.block_size, "block size of the cache");
  check_index(batch.max_block, cache.blocks, "block_tables", "a block that the cache lacks");
  check_index(batch.max_slot, cache.blocks * cache.block_size, "slot_mapping",
              "a slot outside the cache");
}

void check_rope(const Floats2& rope, int64_t dim) {
  check(size(rope, 1) % 2 == 0 && size(rope, 1) <= dim,
        "rotary_dim must be even and at most the head size");
}

void check_fits(const BatchView& batch, const Floats2& rope, int64_t dim) {
  check_rope(rope, dim);
  check_index(batch.max_position, size(rope, 0), "positions", "a row outside the rope table");
}

void bind_views(nb::module_& m) {
  nb::class_<WeightView>(m, "Weight")
      .def("__init__", &init_weight, "data"_a.noconvert(), "dtype"_a, "shape"_a);
  nb::class_<CacheView>(m, "Cache")
      .def("__init__", &init_cache, "keys"_a.noconvert(), "values"_a.noconvert().none(),
           "scales"_a.noconvert().none());
  nb::class_<BatchView>(m, "Batch")
      .def("__init__", &init_batch, "query_start"_a.noconvert(), "seq_lens"_a.noconvert(),
           "block_tables"_a.noconvert(), "positions"_a.noconvert(), "slot_mapping"_a.noconvert(),
           "block_size"_a)
      .def_ro("block_size", &BatchView::block_size);
}

}  // namespace xds
