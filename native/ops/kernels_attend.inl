// Attention of a few query rows of one sequence over one head of the paged cache.
//
// The context is walked in partitions of kPartition positions counted from position 0. A row takes
// a softmax over each partition on its own (maximum, sum, weighted values) and the partitions are
// merged in ascending order, so neither chunking nor batch nor block size touches its bits. A score
// takes the entries of a head in ascending order, a weighted value the positions. Keys lie
// transposed in the cache, so both are GEMMs on the cache as it is.

#include "kernels_attend_tiles.inl"

struct PartSoftmax {
  float max;
  float sum;
};

// scores -> exp(scores * scale - max) over the first `count` entries; zero up to the next 16.
inline PartSoftmax softmax_part(float* scores, int64_t count, float scale) {
  const int64_t padded = (count + 15) / 16 * 16;
  for (int64_t i = count; i < padded; ++i) scores[i] = -INFINITY;
  F16 largest = set1(-INFINITY);
  for (int64_t i = 0; i < padded; i += 16) {
    const F16 scaled = mul(load(scores + i), set1(scale));
    store(scores + i, scaled);
    largest = max(largest, scaled);
  }
  const float top = reduce_max(largest);
  F16 sum = set1(0.0f);
  for (int64_t i = 0; i < padded; i += 16) {
    const F16 weight = exp16(sub(load(scores + i), set1(top)));
    store(scores + i, weight);
    sum = add(sum, weight);
  }
  return {top, reduce_add(sum)};
}

// row[i] *= by[i] for the first `count` entries.
inline void scale_row(float* row, const float* by, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i;
    const F16 factors = load_up_to(by + i, left);
    store_up_to(row + i, mul(load_up_to(row + i, left), factors), left);
  }
}

// The scales of an int8 partition: scores are multiplied by those of the keys, weights by those of
// the values.
struct PartScales {
  float keys[kPartition];
  float values[kPartition];

  PartScales(const AttendTask& t, int64_t first, int64_t count) {
    int64_t block = first / t.block_size, in_block = first % t.block_size;
    for (int64_t j = 0, n = 0; j < count; j += n, ++block, in_block = 0) {
      n = lesser(count - j, t.block_size - in_block);
      const float* from = t.scales + t.block_table[block] * t.scale_stride + in_block;
      std::memcpy(keys + j, from, static_cast<size_t>(n) * sizeof(float));
      std::memcpy(values + j, from + t.block_size, static_cast<size_t>(n) * sizeof(float));
    }
  }

  PartSoftmax softmax(float* scores, int64_t count, float scale) const {
    scale_row(scores, keys, count);
    const PartSoftmax result = softmax_part(scores, count, scale);
    scale_row(scores, values, count);
    return result;
  }
};

// Stands in for PartScales where there are none.
struct NoScales {
  NoScales(const AttendTask&, int64_t, int64_t) {}
  PartSoftmax softmax(float* scores, int64_t count, float scale) const {
    return softmax_part(scores, count, scale);
  }
};

template <class E>
using Scales = std::conditional_t<std::is_same_v<E, Int8Element>, PartScales, NoScales>;

// Adds the weighted values of positions [at, at + kKeyTile) of a partition; seen(row) of its
// positions count. Rows of a tile share the positions that all of them see.
template <class E, class Seen>
inline void weigh_positions(const AttendTask& t, const AttendScratch& s, const Places<E>& places,
                            int64_t start, int64_t at, float* parts, Seen&& seen) {
  auto here = [&](int64_t row) { return greater(0, lesser(kKeyTile, seen(row) - at)); };
  for_row_tiles<kFloatRows>(t.rows - start, [&](auto size, int64_t tile) {
    constexpr int R = size;
    const int64_t row = start + tile, shared = here(row);
    const float* weights = s.scores + row * kPartition + at;
    float* part = parts + row * s.pitch;
    value_columns<E, R>(t, s.pitch, weights, places.values + at, shared, part);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t more = here(row + r) - shared;
      if (more == 0) continue;
      value_columns<E, 1>(t, s.pitch, weights + r * kPartition + shared,
                          places.values + at + shared, more, part + r * s.pitch);
    }
  });
}

// One partition of `count` positions from `first`, for the rows that see any of it; returns the
// first of them.
template <class E>
inline int64_t attend_partition(const AttendTask& t, const AttendScratch& s, int64_t first,
                                int64_t count, float* parts) {
  const int64_t start = greater(0, first - t.first_length + 1) * t.rows_per_token;
  auto seen = [&](int64_t row) {
    return lesser(count, t.first_length + row / t.rows_per_token - first);
  };
  const Places<E> places(t, first, count);
  for (int64_t at = 0; at < count; at += kKeyTile) {
    score_positions<E>(t, s, places, first, at, lesser(kKeyTile, count - at));
  }
  const Scales<E> scales(t, first, count);
  for (int64_t r = start; r < t.rows; ++r) {
    const PartSoftmax softmax = scales.softmax(s.scores + r * kPartition, seen(r), t.scale);
    float* part = parts + r * s.pitch;
    std::memset(part, 0, static_cast<size_t>(s.value_pad) * sizeof(float));
    part[s.value_pad] = softmax.max;
    part[s.value_pad + 1] = softmax.sum;
  }
  for (int64_t at = 0; at < count; at += kKeyTile) {
    weigh_positions<E>(t, s, places, start, at, parts, seen);
  }
  return start;
}

inline float exp1(float x) {
  float lanes[16];
  store(lanes, exp16(set1(x)));
  return lanes[0];
}

// total = total and part as one softmax; both are value_pad values, maximum, sum.
inline void merge_part(float* total, const float* part, int64_t value_pad) {
  const float max = total[value_pad], part_max = part[value_pad];
  const bool is_larger = part_max > max;
  const float top = is_larger ? part_max : max;
  const float keep = is_larger ? exp1(max - top) : 1.0f;
  const float take = is_larger ? 1.0f : exp1(part_max - top);
  for (int64_t d = 0; d < value_pad; ++d) total[d] = total[d] * keep + part[d] * take;
  total[value_pad] = top;
  total[value_pad + 1] = total[value_pad + 1] * keep + part[value_pad + 1] * take;
}

template <class E>
inline void write_result(const AttendTask& t, int64_t value_pad, int64_t row, const float* total) {
  const F16 sum = set1(total[value_pad + 1]);
  for (int64_t d = 0; d < t.value_dim; d += 16) {
    const F16 result = div(load(total + d), sum);
    if (d + 16 <= t.value_dim) {
      E::store(t.out[row] + d, result);
      continue;
    }
    float lanes[16];
    E::store(lanes, result);
    std::memcpy(t.out[row] + d, lanes, static_cast<size_t>(t.value_dim - d) * sizeof(float));
  }
}

// partition(first position, count, parts) attends to one partition; returns the first row that saw
// any of it.
template <class E, class Scratch, class Partition>
inline void walk_partitions(const AttendTask& t, const Scratch& s, Partition&& partition) {
  const int64_t length = t.first_length + t.rows / t.rows_per_token - 1;
  for (int64_t p = t.first_partition; p < t.stop_partition; ++p) {
    const int64_t first = p * kPartition, count = lesser(kPartition, length - first);
    if (t.parts != nullptr) {
      partition(first, count, t.parts + p * t.rows * s.pitch);
      continue;
    }
    const int64_t start = partition(first, count, p == 0 ? s.total : s.part);
    for (int64_t r = start; p > 0 && r < t.rows; ++r) {
      merge_part(s.total + r * s.pitch, s.part + r * s.pitch, s.value_pad);
    }
  }
  for (int64_t r = 0; t.parts == nullptr && r < t.rows; ++r) {
    write_result<E>(t, s.value_pad, r, s.total + r * s.pitch);
  }
}

template <class E>
inline void attend_typed(const AttendTask& t) {
  const AttendScratch s = split_scratch(t);
  walk_partitions<E>(t, s, [&](int64_t first, int64_t count, float* parts) {
    return attend_partition<E>(t, s, first, count, parts);
  });
}

// body(element) for what the cache of `t` holds.
template <class Body>
inline void with_element(const AttendTask& t, Body&& body) {
  switch (t.type) {
    case KvType::kFloat32: return body(F32Element{});
    case KvType::kBf16: return body(Bf16Element{});
    case KvType::kInt8: return body(Int8Element{});
  }
}

inline void attend_plain(const AttendTask& t) {
  with_element(t, [&](auto element) { attend_typed<decltype(element)>(t); });
}

void merge_parts(const AttendTask& t) {
  const AttendScratch s = split_scratch(t);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t length = t.first_length + r / t.rows_per_token;
    float* total = t.parts + r * s.pitch;  // the first part becomes the total
    for (int64_t p = 1; p * kPartition < length; ++p) {
      merge_part(total, total + p * t.rows * s.pitch, s.value_pad);
    }
    with_element(t, [&](auto element) {
      write_result<decltype(element)>(t, s.value_pad, r, total);
    });
  }
}
