// Attention over a bf16 or int8 cache on tile registers. Queries and softmax weights are rounded to
// bf16, int8 becomes bf16; sums stay float32. Both products of a partition are taken 32 terms at a time, counted from its
// first position or entry, so neither the rows nor the blocks of a task touch a row's bits.
//
//   keys [D, block]       --pair neighbours in D-->  panel of 32 positions   scores = q x panel
//   latents [block, D]    --as they are----------->  rows; q becomes the panel, scores transposed
//   values [block, D]     --pair positions-------->  panel of 32 columns     out = weights x panel
//
// Pairing leaves the 32 positions or columns of a panel in an order that in_order() undoes.

constexpr int64_t kGroup = 32;          // positions or columns of a panel
constexpr int64_t kGroupBytes = kTileSteps * kStepBytes;  // of a panel, for 32 terms

struct TileScratch {
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

  int64_t key_tiles() const { return key_pad / kGroup; }
  uint8_t* panel(int64_t position) const { return panels + position * key_pad * 2; }
  uint16_t* weights(int64_t row) const {
    return reinterpret_cast<uint16_t*>(scores + row * kPartition);
  }
};

inline TileScratch split_tile_scratch(const AttendTask& t) {
  const int64_t rows = t.rows + kRowSlack;
  TileScratch s;
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

struct Pair {
  F16 first;
  F16 second;
};

// 16 neighbours in order, from what pairing 16 at a time made of them.
inline F16 in_order(const F16& tile) {
  return {_mm512_shuffle_f32x4(tile.v, tile.v, _MM_SHUFFLE(3, 1, 2, 0))};
}

// 32 neighbours in order, from the two tiles that pairing 32 at a time made of them.
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
inline KeyPieces<typename E::T> key_pieces(const AttendTask& t, const TileScratch& s,
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
inline void pair_keys(const AttendTask& t, const TileScratch& s, const Places<E>& places,
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

// What two products of 16 rows and a panel left in the tiles, or one of 32 rows: rows of 32 floats.
struct alignas(64) TileBlock {
  float rows[2 * kTileRows][kPanel];
};

// 32 rows and one panel.
inline void multiply_rows(const void* a, ptrdiff_t a_stride, const uint8_t* b, int64_t tiles,
                          TileBlock& out) {
  const auto* from = static_cast<const uint8_t*>(a);
  memory_barrier();
  clear_tiles();
  for (int64_t i = 0; i < tiles; ++i, from += 64, b += kGroupBytes) {
    dot_tiles<Bf16Tile>(from, a_stride, true, b);
  }
  store_tiles(out.rows, sizeof out.rows[0], true);
}

// 16 rows and two panels.
inline void multiply_panels(const void* a, ptrdiff_t a_stride, const uint8_t* b,
                            const uint8_t* other, int64_t tiles, TileBlock& out) {
  const auto* from = static_cast<const uint8_t*>(a);
  memory_barrier();
  clear_tiles();
  for (int64_t i = 0; i < tiles; ++i, from += 64, b += kGroupBytes, other += kGroupBytes) {
    _tile_loadd(4, from, a_stride);
    _tile_loadd(6, b, kStepBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 64, kStepBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, other, kStepBytes);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, other + 64, kStepBytes);
    _tile_dpbf16ps(3, 4, 6);
  }
  store_tiles(out.rows, sizeof out.rows[0], true);
}

// Products of `rows` rows and two panels: body(row, which panel, its 32 results).
template <class Body>
inline void multiply_all(const void* a, ptrdiff_t a_stride, int64_t rows, const uint8_t* b,
                         const uint8_t* other, int64_t tiles, Body&& body) {
  const auto* from = static_cast<const uint8_t*>(a);
  TileBlock block;
  for (int64_t row = 0; row < rows; row += kBlockRows, from += kBlockRows * a_stride) {
    const int64_t here = lesser(kBlockRows, rows - row);
    if (here <= kTileRows) {
      multiply_panels(from, a_stride, b, other, tiles, block);
      for (int64_t r = 0; r < here; ++r) {
        body(row + r, 0, block.rows[r]);
        body(row + r, 1, block.rows[kTileRows + r]);
      }
      continue;
    }
    for (int which = 0; which < 2; ++which) {
      multiply_rows(from, a_stride, which == 0 ? b : other, tiles, block);
      for (int64_t r = 0; r < here; ++r) body(row + r, which, block.rows[r]);
    }
  }
}

template <class E>
inline void score_keys(const AttendTask& t, const TileScratch& s, const Places<E>& places,
                       int64_t first, int64_t count, int64_t start) {
  for (int64_t at = 0; at < count; at += kGroup) pair_keys(t, s, places, first, at, count);
  for (int64_t at = 0; at < count; at += 2 * kGroup) {
    const uint8_t* other = s.panel(at + kGroup < count ? at + kGroup : at);
    multiply_all(s.q + start * s.key_pad, s.key_pad * 2, t.rows - start, s.panel(at), other,
                 s.key_tiles(), [&](int64_t row, int which, const float* results) {
                   float* scores = s.scores + (start + row) * kPartition + at + which * kGroup;
                   store(scores, in_order(load(results)));
                   store(scores + 16, in_order(load(results + 16)));
                 });
  }
}

// Panels of 16 query rows: entry pairs of all rows side by side, [key_pad / 2, 16].
inline void transpose_queries(const AttendTask& t, const TileScratch& s) {
  const int64_t pairs = s.key_pad / 2;
  const auto* q = reinterpret_cast<const float*>(s.q);
  auto* panel = reinterpret_cast<float*>(s.queries);
  for (int64_t row = 0; row < t.rows; row += 8) {
    float* to = panel + row / kTileRows * kTileRows * pairs + row % kTileRows;
    for (int64_t d = 0; d < pairs; d += 8) {
      transpose8(q + row * pairs + d, pairs, to + d * kTileRows, kTileRows);
    }
  }
}

// The latents of 64 positions, 16 to a tile. Tiles past the last position repeat the first.
struct LatentTiles {
  const uint16_t* rows[4];
  ptrdiff_t stride;  // bytes
};

inline LatentTiles latent_tiles(const AttendTask& t, const TileScratch& s,
                                const Places<Bf16Element>& places, int64_t at, int64_t count) {
  LatentTiles tiles;
  const bool in_place = t.block_size % 16 == 0 && t.key_dim == s.key_pad;
  tiles.stride = s.key_pad * 2;
  for (int64_t j = 0; !in_place && j < lesser(kKeyTile, count - at); ++j) {
    uint16_t* row = s.keys + j * s.key_pad;
    std::memcpy(row, places.values[at + j], static_cast<size_t>(t.key_dim) * 2);
    for (int64_t d = t.key_dim; d < s.key_pad; ++d) row[d] = 0;
  }
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t j = at + 16 * i < count ? 16 * i : 0;
    tiles.rows[i] = in_place ? places.values[at + j] : s.keys + j * s.key_pad;
  }
  memory_barrier();
  return tiles;
}

// Scores of 64 positions for 16 query rows, one tile of [positions, rows] for each 16 positions.
inline void multiply_latents(const LatentTiles& tiles, const uint8_t* panel, int64_t key_tiles) {
  clear_tiles();
  for (int64_t i = 0; i < key_tiles; ++i, panel += kTileSteps * 64) {
    _tile_loadd(6, panel, 64);
    _tile_loadd(4, tiles.rows[0] + i * kGroup, tiles.stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, tiles.rows[1] + i * kGroup, tiles.stride);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, tiles.rows[2] + i * kGroup, tiles.stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, tiles.rows[3] + i * kGroup, tiles.stride);
    _tile_dpbf16ps(3, 5, 6);
  }
}

inline void score_latents(const AttendTask& t, const TileScratch& s,
                          const Places<Bf16Element>& places, int64_t at, int64_t count,
                          int64_t start) {
  const LatentTiles tiles = latent_tiles(t, s, places, at, count);
  for (int64_t row = start / kTileRows * kTileRows; row < t.rows; row += kTileRows) {
    multiply_latents(tiles, s.queries + row * s.key_pad * 2, s.key_tiles());
    alignas(64) float block[kKeyTile * kTileRows];
    _tile_stored(0, block, 64);
    _tile_stored(1, block + 256, 64);
    _tile_stored(2, block + 512, 64);
    _tile_stored(3, block + 768, 64);
    memory_barrier();
    for (int64_t j = 0; j < kKeyTile; j += 8) {
      for (int64_t r = 0; r < kTileRows; r += 8) {
        transpose8(block + j * kTileRows + r, kTileRows,
                   s.scores + (row + r) * kPartition + at + j, kPartition);
      }
    }
  }
}

// Scores -> bf16 weights of the first `count` positions, zero up to `end`.
template <class PartScales>
inline PartSoftmax weigh_scores(const TileScratch& s, const PartScales& scales, int64_t row,
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
template <class E>
inline bool weigh_values(const AttendTask& t, const TileScratch& s, const Places<E>& places,
                         int64_t row, int64_t stop, int64_t column, int64_t count, bool anyway,
                         float* parts) {
  uint8_t* other = s.values + kPartition * kGroup * 2;
  const bool is_finite = anyway || std::is_same_v<E, Int8Element>;
  const auto pair = is_finite ? pair_values<E, false> : pair_values<E, true>;
  const bool first_is_finite = pair(t, places, count, column, s.values);
  const bool second_is_finite = pair(t, places, count, column + kGroup, other);
  if (!first_is_finite || !second_is_finite) return false;
  multiply_all(s.weights(row), kPartition * 4, stop - row, s.values, other,
               (count + kGroup - 1) / kGroup, [&](int64_t r, int which, const float* results) {
                 const Pair pair = in_order(load(results), load(results + 16));
                 const int64_t at = column + which * kGroup;
                 float* part = parts + (row + r) * s.pitch + at;
                 if (at < s.value_pad) store(part, pair.first);
                 if (at + 16 < s.value_pad) store(part + 16, pair.second);
               });
  return true;
}

template <class E>
inline int64_t attend_tile_partition(const AttendTask& t, const TileScratch& s, int64_t first,
                                     int64_t count, float* parts) {
  const int64_t start = greater(0, first - t.first_length + 1) * t.rows_per_token;
  const int64_t end = (count + kGroup - 1) / kGroup * kGroup;
  auto seen = [&](int64_t row) {
    return lesser(count, t.first_length + row / t.rows_per_token - first);
  };
  const Places<E> places(t, first, count);
  if (t.values != nullptr) score_keys<E>(t, s, places, first, count, start);
  if constexpr (std::is_same_v<E, Bf16Element>) {
    for (int64_t at = 0; t.values == nullptr && at < count; at += kKeyTile) {
      score_latents(t, s, places, at, count, start);
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
    if (weigh_values<E>(t, s, places, start, t.rows, column, count, see_all, parts)) continue;
    for (int64_t r = start; r < t.rows; ++r) {  // zero times infinity: keep to what a row sees
      weigh_values<E>(t, s, places, r, r + 1, column, seen(r), true, parts);
    }
  }
  return start;
}

template <class E>
inline void attend_many(const AttendTask& t) {
  shape_tiles();
  const TileScratch s = split_tile_scratch(t);
  for (int64_t r = 0; r < t.rows; ++r) {
    uint16_t* row = s.q + r * s.key_pad;
    to_bf16_row(t.q[r], t.key_dim, row);
    for (int64_t d = t.key_dim; d < s.key_pad; ++d) row[d] = 0;
  }
  if (t.values == nullptr) transpose_queries(t, s);
  walk_partitions<F32Element>(t, s, [&](int64_t first, int64_t count, float* parts) {
    return attend_tile_partition<E>(t, s, first, count, parts);
  });
}

// While it lives denormals count as zero everywhere, as they do in tiles.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlush); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  static constexpr uint32_t kFlush = 0x8040;  // flush to zero, denormals are zero
  uint32_t saved_;
};

void attend_tiles(const AttendTask& t) {
  if (t.type == KvType::kFloat32) return attend_typed<F32Element>(t);
  const FlushDenormals flush;
  if (t.type == KvType::kBf16) {
    is_for_few(t) ? attend_few<Bf16Element>(t) : attend_many<Bf16Element>(t);
  } else {
    is_for_few(t) ? attend_few<Int8Element>(t) : attend_many<Int8Element>(t);
  }
}
