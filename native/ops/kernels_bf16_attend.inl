// Attention over a bf16 or int8 cache with products of bf16 pairs. Queries and softmax weights are
// rounded to bf16, int8 becomes bf16; sums stay float32. Both products of a partition are taken 32
// terms at a time, counted from its first position or entry, so neither the rows nor the blocks of
// a task touch a row's bits. What multiplies is `Dots`, one of an instruction set.
//
//   keys [D, block]       --pair neighbours in D-->  panel of 32 positions   scores = q x panel
//   latents [block, D]    --as they are----------->  rows; q becomes the panel, scores transposed
//   values [block, D]     --pair positions-------->  panel of 32 columns     out = weights x panel
//
// Pairing leaves the 32 positions or columns of a panel in an order that in_order() undoes.

constexpr int64_t kGroup = 32;          // positions or columns of a panel
constexpr int64_t kGroupBytes = kGroup / 2 * kStepBytes;  // of a panel, for 32 terms
constexpr int64_t kQueryLanes = 16;  // query rows of a panel that latents are multiplied with

struct PairScratch {
  uint16_t* q;      // [rows, key_pad]
  uint8_t* queries;  // latents: panels of 16 query rows
  uint8_t* panels;  // of the keys of a partition
  uint16_t* keys;   // [64, key_pad]: latents that cannot be read in place
  uint8_t* values;  // two panels
  float* scores;    // [rows, kPartition]; then bf16 weights in the first half of each row
  float* part;      // [rows, pitch], as in AttendScratch
  float* total;
  int64_t key_pad;
  int64_t value_pad;
  int64_t pitch;

  int64_t key_groups() const { return key_pad / kGroup; }
  uint8_t* panel(int64_t position) const { return panels + position * key_pad * 2; }
  uint16_t* weights(int64_t row) const {
    return reinterpret_cast<uint16_t*>(scores + row * kPartition);
  }
};

inline PairScratch split_pair_scratch(const AttendTask& t) {
  const int64_t rows = t.rows + kRowSlack;
  PairScratch s;
  s.key_pad = (t.key_dim + kGroup - 1) / kGroup * kGroup;
  s.value_pad = (t.value_dim + 15) / 16 * 16;
  s.pitch = part_floats(t.value_dim);
  auto* next = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(t.scratch) + 63) / 64 * 64);
  auto take = [&](int64_t floats) {
    float* taken = next;
    next += (floats + 15) / 16 * 16;
    return taken;
  };
  s.scores = take(rows * kPartition);
  s.q = reinterpret_cast<uint16_t*>(take(rows * s.key_pad / 2));
  s.queries = reinterpret_cast<uint8_t*>(take(rows * s.key_pad / 2));
  if (t.values != nullptr) s.panels = reinterpret_cast<uint8_t*>(take(kPartition * s.key_pad / 2));
  s.keys = reinterpret_cast<uint16_t*>(take(kKeyTile * s.key_pad / 2));
  s.values = reinterpret_cast<uint8_t*>(take(kPartition * kGroup));
  s.part = take(t.rows * s.pitch);
  s.total = take(t.rows * s.pitch);
  return s;
}

// 16 entries of a query, `left` of which exist; denormals become zero, as in the products.
inline __m256i round_query(const float* x, int64_t left) {
  if (left <= 0) return _mm256_setzero_si256();
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load_up_to(x, left).v));
}

struct Pair {
  F16 first;
  F16 second;
};

// 16 neighbours in order, from what pairing 16 at a time made of them.
inline F16 in_order(const F16& half) {
  return {_mm512_shuffle_f32x4(half.v, half.v, _MM_SHUFFLE(3, 1, 2, 0))};
}

// 32 neighbours in order, from the two halves that pairing 32 at a time made of them.
inline Pair in_order(const F16& low, const F16& high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {{_mm512_permutex2var_ps(low.v, first, high.v)},
          {_mm512_permutex2var_ps(low.v, second, high.v)}};
}

// Two rows of 32 bf16 as one row of a panel: neighbours in k side by side.
inline void store_pairs(uint8_t* panel_row, __m512i even, __m512i odd) {
  _mm512_store_si512(panel_row, _mm512_unpacklo_epi16(even, odd));
  _mm512_store_si512(panel_row + 64, _mm512_unpackhi_epi16(even, odd));
}

// Two rows of 16 bf16 as half a row of a panel.
inline void store_half_pairs(uint8_t* half_row, __m256i even, __m256i odd) {
  auto* to = reinterpret_cast<__m256i*>(half_row);
  _mm256_store_si256(to, _mm256_unpacklo_epi16(even, odd));
  _mm256_store_si256(to + 1, _mm256_unpackhi_epi16(even, odd));
}

// 16 elements of the cache as bf16: exact for int8.
inline __m256i load_half(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline __m256i load_half(const int8_t* p) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load_s8(p).v));
}

// 32 elements of the cache as bf16, those outside the mask zero.
inline __m512i load_row(const uint16_t* p, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, p);
}
inline __m512i load_row(const int8_t* p, __mmask32 mask) {
  return bf16_of_bytes(_mm256_maskz_loadu_epi8(mask, p));
}

// The keys of 32 positions: two pieces of 16, lines of which are `stride` elements apart.
template <class T>
struct KeyPieces {
  const T* low;
  const T* high;
  int64_t stride;
};

// The keys of positions [at, at + 32) of a partition; positions past its end repeat others.
template <class E>
inline KeyPieces<typename E::T> key_pieces(const AttendTask& t, const PairScratch& s,
                                           const Places<E>& places, int64_t first, int64_t at,
                                           int64_t count) {
  using T = typename E::T;
  if (t.block_size % 16 == 0) {
    const T* low = places.keys[at / 16];
    return {low, at + 16 < count ? places.keys[at / 16 + 1] : low, t.block_size};
  }
  auto* keys = reinterpret_cast<T*>(s.keys);
  for (int64_t j = 0; j < lesser(kGroup, count - at); ++j) {
    const int64_t position = first + at + j;
    const T* from = static_cast<const T*>(t.keys) + position % t.block_size +
                    t.block_table[position / t.block_size] * t.block_stride;
    for (int64_t d = 0; d < t.key_dim; ++d) keys[d * kGroup + j] = from[d * t.block_size];
  }
  return {keys, keys + 16, kGroup};
}

// The panel of keys at positions [at, at + 32) of a partition.
template <class E>
inline void pair_keys(const AttendTask& t, const PairScratch& s, const Places<E>& places,
                      int64_t first, int64_t at, int64_t count) {
  const auto keys = key_pieces<E>(t, s, places, first, at, count);
  uint8_t* to = s.panel(at);
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t d = 0; d < s.key_pad; d += 2, to += kStepBytes) {
    auto line = [&](const typename E::T* piece, int64_t which) {
      return d + which < t.key_dim ? load_half(piece + (d + which) * keys.stride) : zero;
    };
    store_half_pairs(to, line(keys.low, 0), line(keys.low, 1));
    store_half_pairs(to + 64, line(keys.high, 0), line(keys.high, 1));
  }
}

template <class Dots, class E>
inline void score_keys(const AttendTask& t, const PairScratch& s, const Places<E>& places,
                       int64_t first, int64_t count, int64_t start) {
  for (int64_t at = 0; at < count; at += kGroup) pair_keys(t, s, places, first, at, count);
  for (int64_t at = 0; at < count; at += 2 * kGroup) {
    const uint8_t* other = s.panel(at + kGroup < count ? at + kGroup : at);
    Dots::panels(s.q + start * s.key_pad, s.key_pad * 2, t.rows - start, s.panel(at), other,
                 s.key_groups(), [&](int64_t row, int which, const F16& low, const F16& high) {
                   float* scores = s.scores + (start + row) * kPartition + at + which * kGroup;
                   store(scores, in_order(low));
                   store(scores + 16, in_order(high));
                 });
  }
}

// Panels of 16 query rows: entry pairs of all rows side by side, [key_pad / 2, 16].
inline void transpose_queries(const AttendTask& t, const PairScratch& s) {
  const int64_t pairs = s.key_pad / 2;
  const auto* q = reinterpret_cast<const float*>(s.q);
  auto* panel = reinterpret_cast<float*>(s.queries);
  for (int64_t row = 0; row < t.rows; row += 8) {
    float* to = panel + row / kQueryLanes * kQueryLanes * pairs + row % kQueryLanes;
    for (int64_t d = 0; d < pairs; d += 8) {
      transpose8(q + row * pairs + d, pairs, to + d * kQueryLanes, kQueryLanes);
    }
  }
}

// The latents of 64 positions, in pieces of 16. Pieces past the last position repeat the first.
struct LatentRows {
  const uint16_t* pieces[4];
  int64_t count;         // of pieces that do not
  ptrdiff_t stride;      // bytes
  const uint16_t* next;  // the piece that follows, or null
};

inline LatentRows latent_rows(const AttendTask& t, const PairScratch& s,
                                const Places<Bf16Element>& places, int64_t at, int64_t count) {
  LatentRows latents;
  const bool in_place = t.block_size % 16 == 0 && t.key_dim == s.key_pad;
  latents.stride = s.key_pad * 2;
  for (int64_t j = 0; !in_place && j < lesser(kKeyTile, count - at); ++j) {
    uint16_t* row = s.keys + j * s.key_pad;
    std::memcpy(row, places.values[at + j], static_cast<size_t>(t.key_dim) * 2);
    for (int64_t d = t.key_dim; d < s.key_pad; ++d) row[d] = 0;
  }
  latents.count = lesser(4, (count - at + 15) / 16);
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t j = i < latents.count ? 16 * i : 0;
    latents.pieces[i] = in_place ? places.values[at + j] : s.keys + j * s.key_pad;
  }
  latents.next = in_place && at + kKeyTile < count ? places.values[at + kKeyTile] : nullptr;
  return latents;
}

template <class Dots>
inline void score_latents(const AttendTask& t, const PairScratch& s,
                          const Places<Bf16Element>& places, int64_t at, int64_t count,
                          int64_t start) {
  const LatentRows latents = latent_rows(t, s, places, at, count);
  const int64_t first_row = start / kQueryLanes * kQueryLanes;
  for (int64_t row = first_row; row < t.rows; row += kQueryLanes) {
    alignas(64) float block[kKeyTile * kQueryLanes];
    const uint8_t* panel = s.queries + row * s.key_pad * 2;
    Dots::latents(latents, panel, s.key_groups(), row == first_row, block);
    for (int64_t j = 0; j < 16 * latents.count; j += 8) {
      for (int64_t r = 0; r < kQueryLanes; r += 8) {
        transpose8(block + j * kQueryLanes + r, kQueryLanes,
                   s.scores + (row + r) * kPartition + at + j, kPartition);
      }
    }
  }
}

// Scores -> bf16 weights of the first `count` positions, zero up to `end`.
template <class Factors>
inline PartSoftmax weigh_scores(const PairScratch& s, const Factors& scales, int64_t row,
                                int64_t count, int64_t end, float scale) {
  auto* weights = reinterpret_cast<__m256i*>(s.weights(row));
  const PartSoftmax softmax =
      round_softmax(s.scores + row * kPartition, scales, count, scale,
                    [&](int64_t i, __m256i bits) { _mm256_store_si256(weights + i / 16, bits); });
  for (int64_t i = (count + 15) / 16; 16 * i < end; ++i) {
    _mm256_store_si256(weights + i, _mm256_setzero_si256());
  }
  return softmax;
}

// A panel of columns [column, column + 32) of the first `count` values, zero beyond; false when
// kCheck and one of them is not finite.
template <class E, bool kCheck>
inline bool pair_values(const AttendTask& t, const Places<E>& places, int64_t count,
                        int64_t column, uint8_t* panel) {
  const int64_t columns = greater(0, lesser(kGroup, t.value_dim - column));
  const auto mask = static_cast<__mmask32>((uint64_t{1} << columns) - 1);
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  __m512i largest = _mm512_setzero_si512();
  auto take = [&](int64_t j) {
    if (j >= count) return _mm512_setzero_si512();
    const __m512i row = load_row(places.values[j] + column, mask);
    if constexpr (kCheck) largest = _mm512_max_epu16(largest, _mm512_and_si512(row, magnitude));
    return row;
  };
  for (int64_t j = 0; j < (count + kGroup - 1) / kGroup * kGroup; j += 2) {
    const __m512i even = take(j);
    store_pairs(panel + j / 2 * kStepBytes, even, take(j + 1));
  }
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7F80)) == 0;
}

// Weighted values of columns [column, column + 64) for rows [row, stop): of the first `count`
// positions. False when a value is not finite and not `anyway`.
template <class Dots, class E>
inline bool weigh_values(const AttendTask& t, const PairScratch& s, const Places<E>& places,
                         int64_t row, int64_t stop, int64_t column, int64_t count, bool anyway,
                         float* parts) {
  uint8_t* other = s.values + kPartition * kGroup * 2;
  const bool is_finite = anyway || std::is_same_v<E, Int8Element>;
  const auto take = is_finite ? pair_values<E, false> : pair_values<E, true>;
  const bool first_is_finite = take(t, places, count, column, s.values);
  const bool second_is_finite = take(t, places, count, column + kGroup, other);
  if (!first_is_finite || !second_is_finite) return false;
  const int64_t groups = (count + kGroup - 1) / kGroup;
  Dots::panels(s.weights(row), kPartition * 4, stop - row, s.values, other, groups,
               [&](int64_t r, int which, const F16& low, const F16& high) {
                 const Pair pair = in_order(low, high);
                 const int64_t at = column + which * kGroup;
                 float* part = parts + (row + r) * s.pitch + at;
                 if (at < s.value_pad) store(part, pair.first);
                 if (at + 16 < s.value_pad) store(part + 16, pair.second);
               });
  return true;
}

template <class Dots, class E>
inline int64_t attend_pair_partition(const AttendTask& t, const PairScratch& s, int64_t first,
                                     int64_t count, float* parts) {
  const int64_t start = greater(0, first - t.first_length + 1) * t.rows_per_token;
  const int64_t end = (count + kGroup - 1) / kGroup * kGroup;
  auto seen = [&](int64_t row) {
    return lesser(count, t.first_length + row / t.rows_per_token - first);
  };
  const Places<E> places(t, first, count);
  if (t.values != nullptr) score_keys<Dots, E>(t, s, places, first, count, start);
  if constexpr (std::is_same_v<E, Bf16Element>) {
    for (int64_t at = 0; t.values == nullptr && at < count; at += kKeyTile) {
      score_latents<Dots>(t, s, places, at, count, start);
    }
  }
  const Scales<E> scales(t, first, count);
  for (int64_t r = start; r < t.rows; ++r) {
    const PartSoftmax softmax = weigh_scores(s, scales, r, seen(r), end, t.scale);
    parts[r * s.pitch + s.value_pad] = softmax.max;
    parts[r * s.pitch + s.value_pad + 1] = softmax.sum;
  }
  for (int64_t column = 0; column < t.value_dim; column += 2 * kGroup) {
    const bool see_all = seen(start) == count;
    if (weigh_values<Dots, E>(t, s, places, start, t.rows, column, count, see_all, parts)) continue;
    for (int64_t r = start; r < t.rows; ++r) {  // zero times infinity: keep to what a row sees
      weigh_values<Dots, E>(t, s, places, r, r + 1, column, seen(r), true, parts);
    }
  }
  return start;
}

template <class Dots, class E>
inline void attend_many(const AttendTask& t) {
  Dots::begin();
  const PairScratch s = split_pair_scratch(t);
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t d = 0; d < s.key_pad; d += 16) {
      auto* to = reinterpret_cast<__m256i*>(s.q + r * s.key_pad + d);
      _mm256_store_si256(to, round_query(t.q[r] + d, t.key_dim - d));
    }
  }
  if (t.values == nullptr) transpose_queries(t, s);
  walk_partitions<F32Element>(t, s, [&](int64_t first, int64_t count, float* parts) {
    return attend_pair_partition<Dots, E>(t, s, first, count, parts);
  });
}
