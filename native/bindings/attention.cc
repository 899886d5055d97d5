// Bindings of the attention operators. Everything a block table or slot can say is checked here,
// so that the kernels never leave the cache.
#include "arrays.h"

namespace xds {

using namespace nb::literals;

Cache view_latents(const AnyArray& keys) {
  check(keys.ndim() == 4, "the latent cache must be [blocks, 1, block size, D]");
  const Cache kv{keys.data(),   nullptr,       is_bf16(keys, "the latent cache"),
                 size(keys, 0), size(keys, 1), size(keys, 2),
                 size(keys, 3)};
  check_equal(kv.heads, 1, "kv heads of a latent cache");
  check(kv.block_size >= 1 && kv.dim >= 1, "the cache has an empty dimension");
  return kv;
}

Cache view_cache(const AnyArray& keys, const AnyArray& values) {
  check(keys.ndim() == 4 && values.ndim() == 4,
        "caches must be [blocks, kv heads, D, block size] (keys) and "
        "[blocks, kv heads, block size, D] (values)");
  const Cache kv{keys.data(),   values.data(), is_bf16(keys, "the key cache"),
                 size(keys, 0), size(keys, 1), size(keys, 3),
                 size(keys, 2)};
  check(kv.heads >= 1 && kv.block_size >= 1 && kv.dim >= 1, "the cache has an empty dimension");
  check(is_bf16(values, "the value cache") == kv.bf16,
        "the value cache must have the dtype of the key cache");
  check_equal(size(values, 0), kv.blocks, "blocks of the value cache");
  check_equal(size(values, 1), kv.heads, "kv heads of the value cache");
  check_equal(size(values, 2), kv.block_size, "block size of the value cache");
  check_equal(size(values, 3), kv.dim, "head size of the value cache");
  return kv;
}

namespace {

void check_slots(const Batch& batch, const Cache& kv) {
  check_range(batch.slots, batch.tokens, 0, kv.blocks * kv.block_size, "slot_mapping");
}

Rope view_rope(const Floats2& table, int64_t dim, const int32_t* positions, int64_t tokens) {
  check(size(table, 1) % 2 == 0 && size(table, 1) <= dim,
        "rotary_dim must be even and at most the head size");
  check_range(positions, tokens, 0, size(table, 0), "positions");
  return {table.data(), size(table, 1) / 2};
}

// Sequence boundaries, and every block that a sequence reads.
Batch view_context(const Ints1& query_start, const Ints1& seq_lens, const Ints2& tables,
                   const Cache& kv, int64_t tokens) {
  Batch batch{};
  batch.tokens = tokens;
  batch.sequences = size(seq_lens, 0);
  batch.max_blocks = size(tables, 1);
  batch.query_start = query_start.data();
  batch.seq_lens = seq_lens.data();
  batch.block_tables = tables.data();
  check_equal(size(query_start, 0), batch.sequences + 1, "length of query_start");
  check_equal(size(tables, 0), batch.sequences, "number of block tables");
  check_equal(batch.query_start[0], 0, "query_start[0]");
  check_equal(batch.query_start[batch.sequences], tokens, "query_start[-1]");
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int64_t rows = batch.query_start[b + 1] - batch.query_start[b];
    check(rows >= 0, "query_start must not decrease");
    check(batch.seq_lens[b] >= rows, "seq_lens must count the tokens of this step too");
    const int64_t blocks = (batch.seq_lens[b] + kv.block_size - 1) / kv.block_size;
    check(blocks <= batch.max_blocks, "a block table is too short for its sequence");
    check_range(batch.block_tables + b * batch.max_blocks, rows > 0 ? blocks : 0, 0, kv.blocks,
                "block_tables");
  }
  return batch;
}

void py_rope_kv_write(Context& ctx, Floats2 qkv, Floats2 rope_table, Ints1 positions, Ints1 slots,
                      AnyArray keys, AnyArray values, std::optional<Floats1> q_norm,
                      std::optional<Floats1> k_norm, float eps, Array<float, 3> q) {
  const Cache kv = view_cache(keys, values);
  const int64_t tokens = size(qkv, 0), num_heads = size(q, 1);
  check_equal(size(qkv, 1), (num_heads + 2 * kv.heads) * kv.dim, "row length of qkv");
  check_equal(size(q, 0), tokens, "rows of q");
  check_equal(size(q, 2), kv.dim, "head size of q");
  check_equal(size(positions, 0), tokens, "length of positions");
  check_equal(size(slots, 0), tokens, "length of slot_mapping");
  if (q_norm) check_equal(size(*q_norm, 0), kv.dim, "length of the q norm");
  if (k_norm) check_equal(size(*k_norm, 0), kv.dim, "length of the k norm");
  Batch batch{};
  batch.tokens = tokens;
  batch.positions = positions.data();
  batch.slots = slots.data();
  check_slots(batch, kv);
  const Rope rope = view_rope(rope_table, kv.dim, batch.positions, tokens);
  const HeadNorm norm{q_norm ? q_norm->data() : nullptr, k_norm ? k_norm->data() : nullptr, eps};
  Turn turn(ctx);
  rope_kv_write(ctx, qkv.data(), rope, batch, kv, num_heads, norm, q.data());
}

void py_rope(Context& ctx, Floats3 x, Floats2 rope_table, Ints1 positions, Array<float, 3> out) {
  const int64_t tokens = size(x, 0), heads = size(x, 1), dim = size(x, 2);
  check_equal(size(positions, 0), tokens, "length of positions");
  check(size(out, 0) == tokens && size(out, 1) == heads && size(out, 2) == dim,
        "out must be shaped like x");
  const Rope table = view_rope(rope_table, dim, positions.data(), tokens);
  Turn turn(ctx);
  rope(ctx, x.data(), table, positions.data(), tokens, heads, dim, out.data());
}

void py_mla_kv_write(Context& ctx, Floats2 latent, Floats2 k_rope, Ints1 slots, AnyArray keys) {
  const Cache kv = view_latents(keys);
  check_equal(size(latent, 1) + size(k_rope, 1), kv.dim, "latent plus rope size");
  check_equal(size(k_rope, 0), size(latent, 0), "rows of k_rope");
  check_equal(size(slots, 0), size(latent, 0), "length of slot_mapping");
  Batch batch{};
  batch.tokens = size(latent, 0);
  batch.slots = slots.data();
  check_slots(batch, kv);
  Turn turn(ctx);
  mla_kv_write(ctx, latent.data(), size(latent, 1), k_rope.data(), batch, kv);
}

void py_paged_attention(Context& ctx, Floats3 q, Ints1 query_start, Ints1 seq_lens, Ints2 tables,
                        AnyArray keys, AnyArray values, float scale, Array<float, 3> out) {
  const Cache kv = view_cache(keys, values);
  const int64_t heads = size(q, 1);
  check(heads >= 1 && heads % kv.heads == 0, "query heads must be a multiple of the kv heads");
  check_equal(size(q, 2), kv.dim, "head size of q");
  check(size(out, 0) == size(q, 0) && size(out, 1) == heads && size(out, 2) == kv.dim,
        "out must be shaped like q");
  const Batch batch = view_context(query_start, seq_lens, tables, kv, size(q, 0));
  Turn turn(ctx);
  paged_attention(ctx, q.data(), batch, kv, heads, scale, out.data());
}

void py_mla_attention(Context& ctx, Floats3 q_latent, Floats3 q_rope, Ints1 query_start,
                      Ints1 seq_lens, Ints2 tables, AnyArray keys, float scale,
                      Array<float, 3> out) {
  const Cache kv = view_latents(keys);
  const int64_t tokens = size(q_latent, 0), heads = size(q_latent, 1), rank = size(q_latent, 2);
  check(heads >= 1 && rank >= 1, "q_latent has an empty dimension");
  check(size(q_rope, 0) == tokens && size(q_rope, 1) == heads, "q_rope must match q_latent");
  check_equal(rank + size(q_rope, 2), kv.dim, "latent plus rope size");
  check(size(out, 0) == tokens && size(out, 1) == heads && size(out, 2) == rank,
        "out must be shaped like q_latent");
  const Batch batch = view_context(query_start, seq_lens, tables, kv, tokens);
  Turn turn(ctx);
  mla_attention(ctx, q_latent.data(), rank, q_rope.data(), batch, kv, heads, scale, out.data());
}

}  // namespace

void bind_attention(nb::class_<Context>& cls) {
  cls.def("rope_kv_write", &py_rope_kv_write, "qkv"_a.noconvert(), "rope"_a.noconvert(),
          "positions"_a.noconvert(), "slot_mapping"_a.noconvert(), "keys"_a.noconvert(),
          "values"_a.noconvert(), "q_norm"_a.noconvert().none(), "k_norm"_a.noconvert().none(),
          "eps"_a, "q"_a.noconvert())
      .def("rope", &py_rope, "x"_a.noconvert(), "rope"_a.noconvert(), "positions"_a.noconvert(),
           "out"_a.noconvert())
      .def("mla_kv_write", &py_mla_kv_write, "latent"_a.noconvert(), "k_rope"_a.noconvert(),
           "slot_mapping"_a.noconvert(), "keys"_a.noconvert())
      .def("paged_attention", &py_paged_attention, "q"_a.noconvert(), "query_start"_a.noconvert(),
           "seq_lens"_a.noconvert(), "block_tables"_a.noconvert(), "keys"_a.noconvert(),
           "values"_a.noconvert(), "scale"_a, "out"_a.noconvert())
      .def("mla_attention", &py_mla_attention, "q_latent"_a.noconvert(), "q_rope"_a.noconvert(),
           "query_start"_a.noconvert(), "seq_lens"_a.noconvert(), "block_tables"_a.noconvert(),
           "keys"_a.noconvert(), "scale"_a, "out"_a.noconvert());
}

}  // namespace xds
