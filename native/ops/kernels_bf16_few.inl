// Attention of a few query rows over a bf16 or int8 cache, with the bits of many rows, for which
// pairing keys and values first would not pay. What multiplies is `Few`, one of an instruction set:
//
//   Factor                       a bf16 number as it multiplies
//   round(x, n, out)             n floats as factors, zero up to the next 16
//   keep(weights, at, bits)      16 bf16 as factors
//   score<E, R, V>(t, keys, ahead, q, scores)   scores of R rows at 16 V positions
//   weigh<E, R>(t, values, weights, count, part, pitch)   part[r] = weighted values, R rows

constexpr int64_t kMostFew = 8;  // more are faster with paired keys and values
constexpr int kFewTile = 4;      // rows that share what they load

inline bool is_for_few(const AttendTask& t) {
  return t.rows <= kMostFew && t.values != nullptr && t.block_size % 16 == 0;
}

constexpr int kScoreVectors = 2;  // few, as only what follows the first ones is fetched ahead

// What scoring brings into the cache: the keys scored next, and its own positions' values. A line
// holds kPer terms of a piece of 16 positions.
template <class T, int V>
struct FewAhead {
  static constexpr int64_t kPer = 4 / static_cast<int64_t>(sizeof(T));
  const T* keys[V];
  const T* values[V];

  // Always inline: a function that only fetches ahead has no effect that the compiler would keep.
  [[gnu::always_inline]] void fetch(int64_t d, int64_t stride) const {
    if (d % kPer == 0) {
      for (const T* piece : keys) __builtin_prefetch(piece + d * stride, 0, 3);
    } else if (d % kPer == 1) {
      for (const T* piece : values) __builtin_prefetch(piece + d * 16, 0, 3);
    }
  }
};

// Brings in the keys that are scored first.
template <class E>
[[gnu::always_inline]] inline void fetch_first_keys(const AttendTask& t, const Places<E>& places,
                                                    int64_t count) {
  constexpr int64_t kPer = 4 / static_cast<int64_t>(sizeof(typename E::T));
  for (int64_t v = 0; v < lesser(kScoreVectors, (count + 15) / 16); ++v) {
    for (int64_t d = 0; d < t.key_dim; d += kPer) {
      __builtin_prefetch(places.keys[v] + d * t.block_size, 0, 3);
    }
  }
}

// Scores of R rows at 16 V positions, the first of which is 16 v.
template <class Few, class E, int R, int V>
inline void score_few_at(const AttendTask& t, const Places<E>& places,
                         const typename Few::Factor* const* q, int64_t v, int64_t vecs,
                         float* scores) {
  const typename E::T* keys[V];
  FewAhead<typename E::T, V> ahead;
  for (int i = 0; i < V; ++i) {
    keys[i] = places.keys[v + i];
    ahead.keys[i] = places.keys[lesser(v + V + i, vecs - 1)];
    ahead.values[i] = places.values[16 * (v + i)];
  }
  Few::template score<E, R, V>(t, keys, ahead, q, scores);
}

// Scores of R rows at the first `count` positions.
template <class Few, class E, int R>
inline void score_few(const AttendTask& t, const Places<E>& places,
                      const typename Few::Factor* const* q, int64_t count, float* scores) {
  constexpr int V = kScoreVectors;
  const int64_t vecs = (count + 15) / 16;
  int64_t v = 0;
  for (; v + V <= vecs; v += V) score_few_at<Few, E, R, V>(t, places, q, v, vecs, scores + 16 * v);
  for (; v < vecs; ++v) score_few_at<Few, E, R, 1>(t, places, q, v, vecs, scores + 16 * v);
}

// One partition for the rows [row, row + t.rows_per_token) of one token, which sees `count` of it.
template <class Few, class E>
inline void attend_few_token(const AttendTask& t, const AttendScratch& s, const Places<E>& places,
                             const Scales<E>& scales, int64_t row, int64_t count, float* parts) {
  using Factor = typename Few::Factor;
  const Factor* q[kMostFew];
  Factor* weights[kMostFew];  // take the place of the scores
  const int64_t rows = t.rows_per_token;
  float* scores = s.scores + row * kPartition;
  for (int64_t r = 0; r < rows; ++r) {
    q[r] = reinterpret_cast<const Factor*>(s.rows + (row + r) * s.key_pad);
    weights[r] = reinterpret_cast<Factor*>(scores + r * kPartition);
  }
  for_row_tiles<kFewTile>(rows, [&](auto size, int64_t r) {
    constexpr int R = decltype(size)::value;
    score_few<Few, E, R>(t, places, q + r, count, scores + r * kPartition);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const PartSoftmax softmax =
        round_softmax(scores + r * kPartition, scales, count, t.scale,
                      [&](int64_t at, __m256i bits) { Few::keep(weights[r], at, bits); });
    float* part = parts + (row + r) * s.pitch;
    part[s.value_pad] = softmax.max;
    part[s.value_pad + 1] = softmax.sum;
  }
  for_row_tiles<kFewTile>(rows, [&](auto size, int64_t r) {
    constexpr int R = decltype(size)::value;
    Few::template weigh<E, R>(t, places.values, weights + r, count, parts + (row + r) * s.pitch,
                              s.pitch);
  });
}

template <class Few, class E>
inline int64_t attend_few_partition(const AttendTask& t, const AttendScratch& s, int64_t first,
                                    int64_t count, float* parts) {
  const int64_t start = greater(0, first - t.first_length + 1) * t.rows_per_token;
  const Places<E> places(t, first, count);
  fetch_first_keys<E>(t, places, count);
  const Scales<E> scales(t, first, count);
  for (int64_t row = start; row < t.rows; row += t.rows_per_token) {
    const int64_t seen = lesser(count, t.first_length + row / t.rows_per_token - first);
    attend_few_token<Few, E>(t, s, places, scales, row, seen, parts);
  }
  return start;
}

template <class Few, class E>
inline void attend_few(const AttendTask& t) {
  const AttendScratch s = split_scratch(t);
  for (int64_t r = 0; r < t.rows; ++r) {
    auto* row = reinterpret_cast<typename Few::Factor*>(s.rows + r * s.key_pad);
    Few::round(t.q[r], t.key_dim, row);
  }
  walk_partitions<F32Element>(t, s, [&](int64_t first, int64_t count, float* parts) {
    return attend_few_partition<Few, E>(t, s, first, count, parts);
  });
}
