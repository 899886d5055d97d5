// What the backend keeps with weights, caches and batches: checked once, when the view is made. A
// call then compares sizes only.
#pragma once

#include "../ops/layer.h"
#include "arrays.h"

namespace xds {

// A packed weight and the memory it lies in.
struct WeightView {
  Bytes data;
  Weight weight;
};

// The cache of a layer; of latents, if it has no values.
struct CacheView {
  AnyArray keys;
  std::optional<AnyArray> values;
  OptionalScales scales;
  Cache cache;
};

// The tokens of a step; `max_*` are the largest entries, which caches and tables must have.
struct BatchView {
  Ints1 query_start, seq_lens;
  Ints2 block_tables;
  Ints1 positions, slots;
  int64_t block_size;
  Batch batch{};
  int64_t max_block = -1, max_slot = -1, max_position = -1;
};

// What keeps the memory of a layer's norms, biases and weights alive.
struct Kept {
  std::vector<Floats1> vectors;
  std::vector<WeightView> weights;

  // The vector's data, null if there is none; it must have `length` entries.
  const float* vector(const std::optional<Floats1>& vector, int64_t length, const char* what);
  // A weight of one group.
  const Weight& plain(const WeightView& weight);
  const Weight& weight(const WeightView& weight);
};

// Norms and router.
struct FrameView {
  Kept kept;
  int64_t width;
  LayerFrame frame{};
};

// The attention side of a layer.
struct LayerView {
  FrameView frame;
  Kept kept;
  Floats2 rope;
  AttentionLayer layer;
};

// The batch and the cache go with the layer.
void check_step(const LayerView& layer, const BatchView& batch, const CacheView& kv);

// Everything that block tables and slots name lies in the cache, so that kernels never leave it.
void check_fits(const BatchView& batch, const Cache& cache);
// Every position has a row of the rope table, which rotates heads of `dim`.
void check_fits(const BatchView& batch, const Floats2& rope, int64_t dim);
void check_rope(const Floats2& rope, int64_t dim);
// A cache of keys and values, or one of latents.
void check_kind(const Cache& cache, bool latents);

// Of attention scores: kernels look for the largest before they multiply, and divide by it.
inline void check_scale(float scale) {
  if (scale > 1e-20f && scale < __builtin_inff()) return;
  fail("scale is " + std::to_string(scale) + "; it must be finite and above 1e-20");
}

inline void check_rows(const Array<float, 2>& array, int64_t rows, int64_t width,
                       const char* what) {
  if (size(array, 0) == rows && size(array, 1) == width) return;
  fail(std::string(what) + " must be [" + std::to_string(rows) + ", " + std::to_string(width) +
       "]");
}

}  // namespace xds
