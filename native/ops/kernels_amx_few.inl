// Attention of a few query rows with the bits of tile registers, which earn nothing on so few: of
// every 32 terms the products of even and of odd ones are added up on their own, then both to the
// sum. Products of bf16 are exact in float32, so a fused multiply-add gives what a tile gives.

constexpr int64_t kTerms = 32;   // of a tile: entries of a head, or positions
constexpr int64_t kMostFew = 8;  // more are faster on tiles
constexpr int kFewTile = 4;      // rows that share what they load

inline bool is_for_few(const AttendTask& t) {
  return t.rows <= kMostFew && t.values != nullptr && t.block_size % 16 == 0;
}

inline F16 float_of_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

// Rounds the first `count` entries, up to the next 16, to bf16.
inline void round_row(float* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const auto bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(row + i).v));
    store(row + i, float_of_bf16(bits));
  }
}

// Sums of up to kTerms products, the even ones and the odd ones apart.
template <int R, int V>
struct TermSums {
  F16 even[R][V];
  F16 odd[R][V];

  TermSums() {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) even[r][v] = odd[r][v] = set1(0.0f);
    }
  }
  F16 total(int r, int v) const { return add(even[r][v], odd[r][v]); }
};

// sums[r][v] += factors[r][at] * values[v]
template <int R, int V>
inline void add_products(const float* const* factors, int64_t at, const F16* values,
                         F16 (&sums)[R][V]) {
  for (int v = 0; v < V; ++v) {
    for (int r = 0; r < R; ++r) sums[r][v] = fma(set1(factors[r][at]), values[v], sums[r][v]);
  }
}

// out[r][16 V] += the terms [0, count) of factors[r] times what load(term, values) reads of each.
template <int R, int V, class Load>
inline void add_terms(const float* const* factors, int64_t count, Load&& load_term, float* out,
                      int64_t pitch) {
  for (int64_t first = 0; first < count; first += kTerms) {
    TermSums<R, V> sums;
    const int64_t stop = lesser(count, first + kTerms);
    int64_t at = first;
    F16 values[V];
    for (; at + 2 <= stop; at += 2) {
      load_term(at, values);
      add_products<R, V>(factors, at, values, sums.even);
      load_term(at + 1, values);
      add_products<R, V>(factors, at + 1, values, sums.odd);
    }
    if (at < stop) {
      load_term(at, values);
      add_products<R, V>(factors, at, values, sums.even);
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        float* sum = out + r * pitch + 16 * v;
        store(sum, add(load(sum), sums.total(r, v)));
      }
    }
  }
}

// Vectors that R rows take at a time: as many as leave their sums in registers.
template <int R>
constexpr int few_vectors() { return R <= 3 ? 4 : 2; }

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

// Scores of R rows at 16 V positions, the first of which is 16 v.
template <class E, int R, int V>
inline void score_few_at(const AttendTask& t, const Places<E>& places, const float* const* q,
                         int64_t v, int64_t vecs, float* scores) {
  using T = typename E::T;
  const T* keys[V];
  FewAhead<T, V> ahead;
  for (int i = 0; i < V; ++i) {
    keys[i] = places.keys[v + i];
    ahead.keys[i] = places.keys[lesser(v + V + i, vecs - 1)];
    ahead.values[i] = places.values[16 * (v + i)];
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < V; ++i) store(scores + r * kPartition + 16 * i, set1(0.0f));
  }
  auto load_keys = [&](int64_t d, F16* values) {
    ahead.fetch(d, t.block_size);
    for (int i = 0; i < V; ++i) values[i] = E::load(keys[i] + d * t.block_size);
  };
  add_terms<R, V>(q, t.key_dim, load_keys, scores, kPartition);
}

// Brings in the keys that are scored first.
template <class E>
[[gnu::always_inline]] inline void fetch_first_keys(const AttendTask& t, const Places<E>& places, int64_t count) {
  constexpr int64_t kPer = 4 / static_cast<int64_t>(sizeof(typename E::T));
  for (int64_t v = 0; v < lesser(kScoreVectors, (count + 15) / 16); ++v) {
    for (int64_t d = 0; d < t.key_dim; d += kPer) {
      __builtin_prefetch(places.keys[v] + d * t.block_size, 0, 3);
    }
  }
}

// Scores of R rows at the first `count` positions.
template <class E, int R>
inline void score_few(const AttendTask& t, const Places<E>& places, const float* const* q,
                      int64_t count, float* scores) {
  constexpr int V = kScoreVectors;
  const int64_t vecs = (count + 15) / 16;
  int64_t v = 0;
  for (; v + V <= vecs; v += V) score_few_at<E, R, V>(t, places, q, v, vecs, scores + 16 * v);
  for (; v < vecs; ++v) score_few_at<E, R, 1>(t, places, q, v, vecs, scores + 16 * v);
}

// part[r] += the first `count` values, weighted by weights[r].
template <class E, int R>
inline void weigh_few(const AttendTask& t, const Places<E>& places, const float* const* weights,
                      int64_t count, float* part, int64_t pitch) {
  constexpr int V = few_vectors<R>();
  int64_t column = 0;
  for (; column + 16 * V <= t.value_dim; column += 16 * V) {
    auto load_values = [&](int64_t j, F16* values) {
      for (int i = 0; i < V; ++i) values[i] = E::load(places.values[j] + column + 16 * i);
    };
    add_terms<R, V>(weights, count, load_values, part + column, pitch);
  }
  for (; column < t.value_dim; column += 16) {
    const int64_t left = t.value_dim - column;
    auto load_values = [&](int64_t j, F16* values) {
      const typename E::T* row = places.values[j] + column;
      values[0] = left >= 16 ? E::load(row) : load_element_tail<E>(row, left);
    };
    add_terms<R, 1>(weights, count, load_values, part + column, pitch);
  }
}

// One partition for the rows [row, row + t.rows_per_token) of one token, which sees `count` of it.
template <class E>
inline void attend_few_token(const AttendTask& t, const AttendScratch& s, const Places<E>& places,
                             const Scales<E>& scales, int64_t row, int64_t count, float* parts) {
  const float* q[kMostFew];
  const float* weights[kMostFew];
  const int64_t rows = t.rows_per_token;
  float* scores = s.scores + row * kPartition;
  for (int64_t r = 0; r < rows; ++r) {
    q[r] = s.rows + (row + r) * s.key_pad;
    weights[r] = scores + r * kPartition;
  }
  for_row_tiles<kFewTile>(rows, [&](auto size, int64_t r) {
    score_few<E, decltype(size)::value>(t, places, q + r, count, scores + r * kPartition);
  });
  for (int64_t r = 0; r < rows; ++r) {
    float* part = parts + (row + r) * s.pitch;
    std::memset(part, 0, static_cast<size_t>(s.value_pad) * sizeof(float));
    float* row_scores = scores + r * kPartition;  // become weights
    const PartSoftmax softmax =
        round_softmax(row_scores, scales, count, t.scale,
                      [&](int64_t i, __m256i bits) { store(row_scores + i, float_of_bf16(bits)); });
    part[s.value_pad] = softmax.max;
    part[s.value_pad + 1] = softmax.sum;
  }
  for_row_tiles<kFewTile>(rows, [&](auto size, int64_t r) {
    weigh_few<E, decltype(size)::value>(t, places, weights + r, count,
                                        parts + (row + r) * s.pitch, s.pitch);
  });
}

template <class E>
inline int64_t attend_few_partition(const AttendTask& t, const AttendScratch& s, int64_t first,
                                    int64_t count, float* parts) {
  const int64_t start = greater(0, first - t.first_length + 1) * t.rows_per_token;
  const Places<E> places(t, first, count);
  fetch_first_keys<E>(t, places, count);
  const Scales<E> scales(t, first, count);
  for (int64_t row = start; row < t.rows; row += t.rows_per_token) {
    const int64_t seen = lesser(count, t.first_length + row / t.rows_per_token - first);
    attend_few_token<E>(t, s, places, scales, row, seen, parts);
  }
  return start;
}

template <class E>
inline void attend_few(const AttendTask& t) {
  const AttendScratch s = split_scratch(t);
  for (int64_t r = 0; r < t.rows; ++r) {
    float* row = s.rows + r * s.key_pad;
    std::memcpy(row, t.q[r], static_cast<size_t>(t.key_dim) * sizeof(float));
    round_row(row, t.key_dim);
  }
  walk_partitions<F32Element>(t, s, [&](int64_t first, int64_t count, float* parts) {
    return attend_few_partition<E>(t, s, first, count, parts);
  });
}
