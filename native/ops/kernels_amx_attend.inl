// Attention over a bf16 or int8 cache on tile registers: of every 32 terms the products of even and
// of odd ones are added up on their own, then both to the sum.

// What two products of 16 rows and a panel left in the tiles, or one of 32 rows.
using TileBlock = TileSums<float>;

// 32 rows and one panel.
inline void multiply_rows(const void* a, ptrdiff_t a_stride, const uint8_t* b, int64_t groups,
                          TileBlock& out) {
  const auto* from = static_cast<const uint8_t*>(a);
  memory_barrier();
  clear_tiles();
  for (int64_t i = 0; i < groups; ++i, from += 64, b += kGroupBytes) {
    dot_tiles<Bf16Tile>(from, a_stride, true, b);
  }
  store_tiles(out.rows, sizeof out.rows[0], true);
}

// 16 rows and two panels.
inline void multiply_panels(const void* a, ptrdiff_t a_stride, const uint8_t* b,
                            const uint8_t* other, int64_t groups, TileBlock& out) {
  const auto* from = static_cast<const uint8_t*>(a);
  memory_barrier();
  clear_tiles();
  for (int64_t i = 0; i < groups; ++i, from += 64, b += kGroupBytes, other += kGroupBytes) {
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

struct TileDots {
  static void begin() { shape_tiles(); }

  // Products of `rows` rows and two panels: body(row, which panel, 16 results, 16 more).
  template <class Body>
  static void panels(const void* a, ptrdiff_t a_stride, int64_t rows, const uint8_t* b,
                     const uint8_t* other, int64_t groups, Body&& body) {
    const auto* from = static_cast<const uint8_t*>(a);
    TileBlock block;
    auto take = [&](int64_t row, int which, const float* results) {
      body(row, which, load(results), load(results + 16));
    };
    for (int64_t row = 0; row < rows; row += kTileBlockRows, from += kTileBlockRows * a_stride) {
      const int64_t here = lesser(kTileBlockRows, rows - row);
      if (here <= kTileRows) {
        multiply_panels(from, a_stride, b, other, groups, block);
        for (int64_t r = 0; r < here; ++r) {
          take(row + r, 0, block.rows[r]);
          take(row + r, 1, block.rows[kTileRows + r]);
        }
        continue;
      }
      for (int which = 0; which < 2; ++which) {
        multiply_rows(from, a_stride, which == 0 ? b : other, groups, block);
        for (int64_t r = 0; r < here; ++r) take(row + r, which, block.rows[r]);
      }
    }
  }

  // Scores [64, 16] of 64 positions for a panel of 16 query rows.
  static void latents(const LatentRows& latents, const uint8_t* panel, int64_t groups,
                      bool /*is_first*/, float* scores) {
    memory_barrier();
    clear_tiles();
    for (int64_t i = 0; i < groups; ++i, panel += kGroupBytes / 2) {
      _tile_loadd(6, panel, 64);
      _tile_loadd(4, latents.pieces[0] + i * kGroup, latents.stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, latents.pieces[1] + i * kGroup, latents.stride);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(4, latents.pieces[2] + i * kGroup, latents.stride);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, latents.pieces[3] + i * kGroup, latents.stride);
      _tile_dpbf16ps(3, 5, 6);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + 256, 64);
    _tile_stored(2, scores + 512, 64);
    _tile_stored(3, scores + 768, 64);
    memory_barrier();
  }
};

// Tiles earn nothing on a few rows. Products of bf16 are exact in float32, so a fused multiply-add
// gives what a tile gives.

inline F16 float_of_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

// Sums of up to 32 products, the even ones and the odd ones apart.
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
  for (int64_t first = 0; first < count; first += kGroup) {
    TermSums<R, V> sums;
    const int64_t stop = lesser(count, first + kGroup);
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

struct TileFew {
  using Factor = float;

  static void round(const float* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 16) {
      keep(out, i, round_query(x + i, n - i));
    }
  }

  static void keep(float* row, int64_t at, __m256i bits) { store(row + at, float_of_bf16(bits)); }

  template <class E, int R, int V>
  static void score(const AttendTask& t, const typename E::T* const* keys,
                    const FewAhead<typename E::T, V>& ahead, const float* const* q,
                    float* scores) {
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < V; ++i) store(scores + r * kPartition + 16 * i, set1(0.0f));
    }
    auto load_keys = [&](int64_t d, F16* entries) {
      ahead.fetch(d, t.block_size);
      for (int i = 0; i < V; ++i) entries[i] = E::load(keys[i] + d * t.block_size);
    };
    add_terms<R, V>(q, t.key_dim, load_keys, scores, kPartition);
  }

  template <class E, int R>
  static void weigh(const AttendTask& t, const typename E::T* const* values,
                    const float* const* weights, int64_t count, float* part, int64_t pitch) {
    constexpr int V = few_vectors<R>();
    for (int r = 0; r < R; ++r) {
      for (int64_t d = 0; d < t.value_dim; d += 16) store(part + r * pitch + d, set1(0.0f));
    }
    int64_t column = 0;
    for (; column + 16 * V <= t.value_dim; column += 16 * V) {
      auto load_values = [&](int64_t j, F16* entries) {
        for (int i = 0; i < V; ++i) entries[i] = E::load(values[j] + column + 16 * i);
      };
      add_terms<R, V>(weights, count, load_values, part + column, pitch);
    }
    for (; column < t.value_dim; column += 16) {
      const int64_t left = t.value_dim - column;
      auto load_values = [&](int64_t j, F16* entries) {
        const typename E::T* row = values[j] + column;
        entries[0] = left >= 16 ? E::load(row) : load_element_tail<E>(row, left);
      };
      add_terms<R, 1>(weights, count, load_values, part + column, pitch);
    }
  }
};

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

// Parts are merged as where they need not be cut.
void merge_tile_parts(const AttendTask& t) {
  if (t.type == KvType::kFloat32) return merge_parts(t);
  const FlushDenormals flush;
  merge_parts(t);
}

void attend_tiles(const AttendTask& t) {
  if (t.type == KvType::kFloat32) return attend_typed<F32Element>(t);
  const FlushDenormals flush;
  if (t.type == KvType::kBf16) {
    is_for_few(t) ? attend_few<TileFew, Bf16Element>(t) : attend_many<TileDots, Bf16Element>(t);
  } else {
    is_for_few(t) ? attend_few<TileFew, Int8Element>(t) : attend_many<TileDots, Int8Element>(t);
  }
}
