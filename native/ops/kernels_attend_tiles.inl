// Attention's two GEMMs on the paged cache: scores of some positions, and their weighted values.
// Each sum has one accumulator that takes its terms in ascending order.

// How 16 neighbours in the cache become floats; lanes may be permuted until `store`.
struct F32Element {
  using T = float;
  static F16 load(const float* p) { return ::xds::load(p); }
  static void store(float* out, const F16& lanes) { ::xds::store(out, lanes); }
  static float value(float x) { return x; }
};

struct Bf16Element {
  using T = uint16_t;
  static F16 load(const uint16_t* p) { return load_bf16(p); }
  static void store(float* out, const F16& lanes) { store_bf16_lanes(out, lanes); }
  static float value(uint16_t x) { return from_bf16(x); }
};

// The rows' scales are multiplied into scores and weights, see PartScales.
struct Int8Element {
  using T = int8_t;
  static F16 load(const int8_t* p) { return load_s8(p); }
  static void store(float* out, const F16& lanes) { ::xds::store(out, lanes); }
  static float value(int8_t x) { return static_cast<float>(x); }
};

template <class E>
inline F16 load_element_tail(const typename E::T* p, int64_t n) {
  typename E::T padded[16] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof padded[0]);
  return E::load(padded);
}

struct AttendScratch {
  float* scores;  // [rows, kPartition]
  float* part;    // [rows, pitch]: weighted values of this partition, then maximum and sum
  float* total;   // [rows, pitch]
  float* keys;    // [key_dim, kKeyTile]: keys that cannot be read in place
  float* rows;    // [8, key_pad]
  int64_t value_pad;
  int64_t key_pad;
  int64_t pitch;
};

inline AttendScratch split_scratch(const AttendTask& t) {
  AttendScratch s;
  s.value_pad = (t.value_dim + 15) / 16 * 16;
  s.key_pad = (t.key_dim + 15) / 16 * 16;
  s.pitch = part_floats(t.value_dim);
  s.scores = t.scratch;
  s.part = s.scores + t.rows * kPartition;
  s.total = s.part + t.rows * s.pitch;
  s.keys = s.total + t.rows * s.pitch;
  s.rows = s.keys + t.key_dim * kKeyTile;
  return s;
}

// Where the positions of one partition lie in the cache.
template <class E>
struct Places {
  using T = typename E::T;
  const T* keys[kPartition / 16];  // of every 16th position, if blocks are that long
  const T* values[kPartition];

  Places(const AttendTask& t, int64_t first, int64_t count) {
    const bool latent = t.values == nullptr;
    const T* base = static_cast<const T*>(latent ? t.keys : t.values);
    const int64_t row = latent ? t.key_dim : t.value_dim;
    int64_t block = first / t.block_size, in_block = first % t.block_size;
    for (int64_t j = 0; j < count; ++block, in_block = 0) {
      const int64_t offset = t.block_table[block] * t.block_stride;
      const int64_t stop = lesser(count, j + t.block_size - in_block);
      for (; j < stop; ++j, ++in_block) {
        values[j] = base + offset + in_block * row;
        if (j % 16 == 0) keys[j / 16] = static_cast<const T*>(t.keys) + offset + in_block;
      }
    }
  }
};

// Makes the compiler read again what lies behind p, where registers are scarcer than loads.
template <class T>
inline void forget(T*& p) {
  asm("" : "+r"(p));
}

// What a tile brings into the cache while it computes: the keys of the next tile and its own
// values, both laid out as 16 positions in a piece.
struct Ahead {
  const void* keys[2];
  const void* values[2];

  void fetch(int which, int64_t bytes) const {
    __builtin_prefetch(static_cast<const uint8_t*>(keys[which]) + bytes, 0, 3);
    __builtin_prefetch(static_cast<const uint8_t*>(values[which]) + bytes, 0, 3);
  }
};

// Scores of R query rows and 16 * V positions.
template <class E, int R, int V, bool kAhead>
inline void score_tile(const float* const* q, const typename E::T* const* keys, int64_t stride,
                       int64_t dim, const Ahead& ahead, float* scores) {
  F16 acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = set1(0.0f);
  }
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = q[r];
  constexpr int64_t kBytes = sizeof(typename E::T);
  for (int64_t d = 0, at = 0; d < dim; ++d, at += stride) {
    if constexpr (kAhead) ahead.fetch(d % V, at * kBytes);
    for (int v = 0; v < V; ++v) {
      const F16 key = E::load(keys[v] + at);
      for (int r = 0; r < R; ++r) {
        if (v > 0) forget(rows[r]);
        acc[r][v] = fma(set1(rows[r][d]), key, acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) E::store(scores + r * kPartition + 16 * v, acc[r][v]);
  }
}

// `values`: null, or where every 16 positions have their values, to be fetched ahead.
template <class E, bool kAhead>
inline void score_rows(const float* const* q, int64_t rows, const typename E::T* const* keys,
                       const typename E::T* const* values, int64_t vecs, int64_t stride,
                       int64_t dim, float* scores) {
  for_row_tiles<kFloatRows>(rows, [&](auto size, int64_t first) {
    constexpr int R = size;
    constexpr int V = R <= kDoubleRows ? 2 : 1;
    float* out = scores + first * kPartition;
    Ahead ahead{};
    int64_t v = 0;
    for (; v + V <= vecs; v += V) {
      for (int i = 0; kAhead && i < V; ++i) {
        ahead.keys[i] = keys[lesser(v + V + i, vecs - 1)];
        ahead.values[i] = values[16 * (v + i)];
      }
      score_tile<E, R, V, kAhead>(q + first, keys + v, stride, dim, ahead, out + 16 * v);
    }
    if (v < vecs) {
      score_tile<E, R, 1, false>(q + first, keys + v, stride, dim, ahead, out + 16 * v);
    }
  });
}

// keys[d][j] of `count` rows, eight rows at a time.
template <class E>
inline void transpose_rows(const AttendTask& t, const AttendScratch& s,
                           const typename E::T* const* rows, int64_t count) {
  for (int64_t j = 0; j < count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      const typename E::T* row = rows[lesser(j + i, count - 1)];
      float* to = s.rows + i * s.key_pad;
      for (int64_t d = 0; d < t.key_dim; ++d) to[d] = E::value(row[d]);
    }
    for (int64_t d = 0; d < s.key_pad; d += 8) {
      if (d + 8 <= t.key_dim) {
        transpose8(s.rows + d, s.key_pad, s.keys + d * kKeyTile + j, kKeyTile);
        continue;
      }
      for (int64_t e = d; e < t.key_dim; ++e) {
        for (int64_t i = 0; i < 8; ++i) s.keys[e * kKeyTile + j + i] = s.rows[i * s.key_pad + e];
      }
    }
  }
}

// keys[d][j] of `count` positions from `first` in blocks that are not a multiple of 16 long.
template <class E>
inline void gather_keys(const AttendTask& t, const AttendScratch& s, int64_t first, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const int64_t block = t.block_table[(first + j) / t.block_size];
    const typename E::T* from = static_cast<const typename E::T*>(t.keys) +
                                block * t.block_stride + (first + j) % t.block_size;
    for (int64_t d = 0; d < t.key_dim; ++d) {
      s.keys[d * kKeyTile + j] = E::value(from[d * t.block_size]);
    }
  }
}

// Scores of kKeyTile positions from `first + at` for the rows that see any of them.
template <class E>
inline void score_positions(const AttendTask& t, const AttendScratch& s, const Places<E>& places,
                            int64_t first, int64_t at, int64_t count) {
  const int64_t start = greater(0, first + at - t.first_length + 1) * t.rows_per_token;
  const int64_t vecs = (count + 15) / 16, rows = t.rows - start;
  float* scores = s.scores + start * kPartition + at;
  if (t.values != nullptr && t.block_size % 16 == 0) {
    const auto score = rows <= kFloatRows ? score_rows<E, true> : score_rows<E, false>;
    return score(t.q + start, rows, places.keys + at / 16, places.values + at, vecs, t.block_size,
                 t.key_dim, scores);
  }
  if (t.values == nullptr) {
    transpose_rows<E>(t, s, places.values + at, count);
  } else {
    gather_keys<E>(t, s, first + at, count);
  }
  const float* keys[kKeyTile / 16];
  for (int64_t v = 0; v < vecs; ++v) keys[v] = s.keys + 16 * v;
  score_rows<F32Element, false>(t.q + start, rows, keys, nullptr, vecs, kKeyTile, t.key_dim,
                                scores);
}

// part[R, 16 * V] += weights[R, count] * values[count, 16 * V]; V = 0: the last `left` columns.
template <class E, int R, int V>
inline void value_tile(const float* weights, const typename E::T* const* values, int64_t count,
                       int64_t column, int64_t left, float* part, int64_t pitch) {
  constexpr int N = V == 0 ? 1 : V;
  F16 acc[R][N];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < N; ++v) acc[r][v] = load(part + r * pitch + 16 * v);
  }
  for (int64_t j = 0; j < count; ++j) {
    const typename E::T* row = values[j] + column;
    for (int v = 0; v < N; ++v) {
      const F16 value = V == 0 ? load_element_tail<E>(row, left) : E::load(row + 16 * v);
      if (v > 0) forget(weights);
      for (int r = 0; r < R; ++r) {
        acc[r][v] = fma(set1(weights[r * kPartition + j]), value, acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < N; ++v) store(part + r * pitch + 16 * v, acc[r][v]);
  }
}

template <class E, int R>
inline void value_columns(const AttendTask& t, int64_t pitch, const float* weights,
                          const typename E::T* const* values, int64_t count, float* part) {
  constexpr int V = R <= kDoubleRows ? 2 : 1;
  int64_t d = 0;
  for (; d + 16 * V <= t.value_dim; d += 16 * V) {
    value_tile<E, R, V>(weights, values, count, d, 0, part + d, pitch);
  }
  for (; d + 16 <= t.value_dim; d += 16) {
    value_tile<E, R, 1>(weights, values, count, d, 0, part + d, pitch);
  }
  if (d < t.value_dim) {
    value_tile<E, R, 0>(weights, values, count, d, t.value_dim - d, part + d, pitch);
  }
}
