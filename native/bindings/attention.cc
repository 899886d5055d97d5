// Bindings of the attention operators, and the checks of caches.
#include "views.h"

namespace xds {

using namespace nb::literals;

Cache view_latents(const AnyArray& keys) {
  check(keys.ndim() == 4, "the latent cache must be [blocks, 1, block size, D]");
  const Cache kv{keys.data(),   nullptr,       nullptr,       kv_type(keys, false, "the latent cache"),
                 size(keys, 0), size(keys, 1), size(keys, 2), size(keys, 3)};
  check_equal(kv.heads, 1, "kv heads of a latent cache");
  check(kv.block_size >= 1 && kv.dim >= 1, "the cache has an empty dimension");
  return kv;
}

Cache view_cache(const AnyArray& keys, const AnyArray& values, const OptionalScales& scales) {
  check(keys.ndim() == 4 && values.ndim() == 4,
        "caches must be [blocks, kv heads, D, block size] (keys) and "
        "[blocks, kv heads, block size, D] (values)");
  const Cache kv{keys.data(),
                 values.data(),
                 scales ? scales->data() : nullptr,
                 kv_type(keys, scales.has_value(), "the key cache"),
                 size(keys, 0),
                 size(keys, 1),
                 size(keys, 3),
                 size(keys, 2)};
  check(kv.heads >= 1 && kv.block_size >= 1 && kv.dim >= 1, "the cache has an empty dimension");
  check(kv_type(values, scales.has_value(), "the value cache") == kv.type,
        "the value cache must have the dtype of the key cache");
  check_equal(size(values, 0), kv.blocks, "blocks of the value cache");
  check_equal(size(values, 1), kv.heads, "kv heads of the value cache");
  check_equal(size(values, 2), kv.block_size, "block size of the value cache");
  check_equal(size(values, 3), kv.dim, "head size of the value cache");
  if (scales) {
    check(size(*scales, 0) == kv.blocks && size(*scales, 1) == kv.heads && size(*scales, 2) == 2 &&
              size(*scales, 3) == kv.block_size,
          "scales must be [blocks, kv heads, 2, block size]");
  }
  return kv;
}

namespace {

void py_rope_kv_write(Context& ctx, Floats2 qkv, Floats2 rope_table, const BatchView& batch,
                      const CacheView& kv, std::optional<Floats1> q_norm,
                      std::optional<Floats1> k_norm, float eps, Array<float, 3> q) {
  const Cache& cache = kv.cache;
  const int64_t tokens = batch.batch.tokens, num_heads = size(q, 1);
  check_kind(cache, false);
  check_fits(batch, cache);
  check_fits(batch, rope_table, cache.dim);
  check_equal(size(qkv, 0), tokens, "rows of qkv");
  check_equal(size(qkv, 1), (num_heads + 2 * cache.heads) * cache.dim, "row length of qkv");
  check_equal(size(q, 0), tokens, "rows of q");
  check_equal(size(q, 2), cache.dim, "head size of q");
  if (q_norm) check_equal(size(*q_norm, 0), cache.dim, "length of the q norm");
  if (k_norm) check_equal(size(*k_norm, 0), cache.dim, "length of the k norm");
  const Rope rope{rope_table.data(), size(rope_table, 1) / 2};
  const HeadNorm norm{q_norm ? q_norm->data() : nullptr, k_norm ? k_norm->data() : nullptr, eps};
  Turn turn(ctx);
  rope_kv_write(ctx, qkv.data(), rope, batch.batch, cache, num_heads, norm, q.data());
}

void py_rope(Context& ctx, Floats3 x, Floats2 rope_table, Ints1 positions, Array<float, 3> out) {
  const int64_t tokens = size(x, 0), heads = size(x, 1), dim = size(x, 2);
  check_equal(size(positions, 0), tokens, "length of positions");
  check(size(out, 0) == tokens && size(out, 1) == heads && size(out, 2) == dim,
        "out must be shaped like x");
  check_rope(rope_table, dim);
  check_range(positions.data(), tokens, 0, size(rope_table, 0), "positions");
  const Rope table{rope_table.data(), size(rope_table, 1) / 2};
  Turn turn(ctx);
  rope(ctx, x.data(), table, positions.data(), tokens, heads, dim, out.data());
}

void py_mla_kv_write(Context& ctx, Floats2 latent, Floats2 k_rope, const BatchView& batch,
                     const CacheView& kv) {
  check_kind(kv.cache, true);
  check_fits(batch, kv.cache);
  check_equal(size(latent, 1) + size(k_rope, 1), kv.cache.dim, "latent plus rope size");
  check_equal(size(latent, 0), batch.batch.tokens, "rows of latent");
  check_equal(size(k_rope, 0), batch.batch.tokens, "rows of k_rope");
  Turn turn(ctx);
  mla_kv_write(ctx, latent.data(), size(latent, 1), k_rope.data(), batch.batch, kv.cache);
}

void py_paged_attention(Context& ctx, Floats3 q, const BatchView& batch, const CacheView& kv,
                        float scale, Array<float, 3> out) {
  const Cache& cache = kv.cache;
  const int64_t heads = size(q, 1);
  check_kind(cache, false);
  check_fits(batch, cache);
  check(heads >= 1 && heads % cache.heads == 0, "query heads must be a multiple of the kv heads");
  check_equal(size(q, 0), batch.batch.tokens, "rows of q");
  check_equal(size(q, 2), cache.dim, "head size of q");
  check(size(out, 0) == size(q, 0) && size(out, 1) == heads && size(out, 2) == cache.dim,
        "out must be shaped like q");
  Turn turn(ctx);
  check_scale(scale);
  paged_attention(ctx, q.data(), batch.batch, cache, heads, scale, out.data());
}

void py_mla_attention(Context& ctx, Floats3 q_latent, Floats3 q_rope, const BatchView& batch,
                      const CacheView& kv, float scale, Array<float, 3> out) {
  const int64_t tokens = size(q_latent, 0), heads = size(q_latent, 1), rank = size(q_latent, 2);
  check_kind(kv.cache, true);
  check_fits(batch, kv.cache);
  check(heads >= 1 && rank >= 1, "q_latent has an empty dimension");
  check_equal(tokens, batch.batch.tokens, "rows of q_latent");
  check(size(q_rope, 0) == tokens && size(q_rope, 1) == heads, "q_rope must match q_latent");
  check_equal(rank + size(q_rope, 2), kv.cache.dim, "latent plus rope size");
  check(size(out, 0) == tokens && size(out, 1) == heads && size(out, 2) == rank,
        "out must be shaped like q_latent");
  Turn turn(ctx);
  check_scale(scale);
  mla_attention(ctx, q_latent.data(), rank, q_rope.data(), batch.batch, kv.cache, heads, scale,
                out.data());
}

}  // namespace

void bind_attention(nb::class_<Context>& cls) {
  cls.def("rope_kv_write", &py_rope_kv_write, "qkv"_a.noconvert(), "rope"_a.noconvert(),
          "batch"_a, "kv"_a, "q_norm"_a.noconvert().none(), "k_norm"_a.noconvert().none(),
          "eps"_a, "q"_a.noconvert())
      .def("rope", &py_rope, "x"_a.noconvert(), "rope"_a.noconvert(), "positions"_a.noconvert(),
           "out"_a.noconvert())
      .def("mla_kv_write", &py_mla_kv_write, "latent"_a.noconvert(), "k_rope"_a.noconvert(),
           "batch"_a, "kv"_a)
      .def("paged_attention", &py_paged_attention, "q"_a.noconvert(), "batch"_a, "kv"_a,
           "scale"_a, "out"_a.noconvert())
      .def("mla_attention", &py_mla_attention, "q_latent"_a.noconvert(), "q_rope"_a.noconvert(),
           "batch"_a, "kv"_a, "scale"_a, "out"_a.noconvert());
}

}  // namespace xds
