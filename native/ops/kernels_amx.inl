// GEMM on tile registers (AMX). A panel is, 64 bytes of every k-step at a time, just what a tile of
// weights looks like; 16 k-steps meet 16 rows at a time. For bf16 the instruction adds the products
// of even and of odd k of those 16 steps on their own, then both to the accumulator. No other
// instruction gives these bits, so every row count goes through it; rows that do not exist are
// computed too and dropped.
//
//   tile 6, 7: weights, outputs 0-15 and 16-31   tile 4, 5: rows 0-15 and 16-31
//   tile 0, 1: rows 0-15 of both                 tile 2, 3: rows 16-31 of both

constexpr int64_t kTileSteps = 16;  // k-steps of one tile
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBlockRows = 2 * kTileRows;
static_assert(kRowSlack == kTileBlockRows - 1);

struct Bf16Tile {
  static void dot_first() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static void dot_second() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

struct Int8Tile {
  static void dot_first() {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
  }
  static void dot_second() {
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
};

// The compiler does not see that tile instructions read and write memory.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// Shaping the tiles costs as much as a small product. It lasts until someone else uses the tiles of
// this thread, which can only happen between operators, on the thread that calls them.
thread_local bool tiles_are_shaped = false;

void forget_tiles() { tiles_are_shaped = false; }

inline void shape_tiles() {
  if (tiles_are_shaped) return;
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  memory_barrier();
  _tile_loadconfig(&shapes);
  tiles_are_shaped = true;
}

inline void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <class Tile>
inline void dot_tiles(const uint8_t* a, ptrdiff_t a_stride, bool both, const uint8_t* b) {
  _tile_loadd(6, b, kStepBytes);
  _tile_loadd(7, b + 64, kStepBytes);
  _tile_loadd(4, a, a_stride);
  Tile::dot_first();
  if (!both) return;
  _tile_loadd(5, a + kTileRows * a_stride, a_stride);
  Tile::dot_second();
}

// The last k-steps, fewer than a tile has, padded with zero.
template <class Tile>
inline void dot_last_tiles(const uint8_t* a, ptrdiff_t a_stride, int64_t rows, const uint8_t* b,
                           int64_t steps) {
  alignas(64) uint8_t padded_a[kTileBlockRows * 64] = {};
  alignas(64) uint8_t padded_b[kTileSteps * kStepBytes] = {};
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(padded_a + r * 64, a + r * a_stride, static_cast<size_t>(4 * steps));
  }
  std::memcpy(padded_b, b, static_cast<size_t>(steps * kStepBytes));
  memory_barrier();
  dot_tiles<Tile>(padded_a, 64, rows > kTileRows, padded_b);
}

// The accumulators as rows of 32 outputs, `pitch` bytes apart.
inline void store_tiles(void* out, ptrdiff_t pitch, bool both) {
  auto* first = static_cast<uint8_t*>(out);
  _tile_stored(0, first, pitch);
  _tile_stored(1, first + 64, pitch);
  if (both) {
    _tile_stored(2, first + kTileRows * pitch, pitch);
    _tile_stored(3, first + kTileRows * pitch + 64, pitch);
  }
  memory_barrier();
}

// The accumulators as rows of 32 sums.
template <class T>
struct alignas(64) TileSums {
  T rows[kTileBlockRows][kPanel];
};

// The accumulators become `rows` rows of `a`, at most 32, times the panel.
template <class Tile>
inline void multiply_block(const PanelTask& t, const uint8_t* a, int64_t rows, Prefetch& fetch) {
  const ptrdiff_t a_stride = t.rows == 1 ? 0 : t.a_stride;  // one row is read 16 times
  const uint8_t* b = t.b;
  clear_tiles();
  int64_t left = t.steps;
  for (; left >= kTileSteps; left -= kTileSteps, a += 64, b += kTileSteps * kStepBytes) {
    fetch.step();
    dot_tiles<Tile>(a, a_stride, rows > kTileRows, b);
  }
  if (left > 0) dot_last_tiles<Tile>(a, t.a_stride, rows, b, left);
}

inline Prefetch fetch_next(const PanelTask& t) {
  const bool is_one_pass = t.rows <= kTileBlockRows;
  return {t.next, t.steps * kStepBytes, kTileSteps * (is_one_pass ? kStepBytes / 64 : 1)};
}

// body(first, rows) for blocks of at most 32 rows.
template <class Body>
inline void for_row_blocks(int64_t count, Body&& body) {
  for (int64_t first = 0; first < count; first += kTileBlockRows) {
    body(first, lesser(kTileBlockRows, count - first));
  }
}

void bf16_gemm(const PanelTask& t) {
  shape_tiles();
  Prefetch fetch = fetch_next(t);
  for_row_blocks(t.rows, [&](int64_t first, int64_t rows) {
    multiply_block<Bf16Tile>(t, t.a + first * t.a_stride, rows, fetch);
    if (rows == kTileBlockRows && t.cols == kPanel && t.bias == nullptr) {
      return store_tiles(t.c + first * t.c_stride, t.c_stride * 4, true);
    }
    TileSums<float> sums;
    store_tiles(sums.rows, sizeof sums.rows[0], rows > kTileRows);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t col = 0; col < t.cols; col += 16) {
        write_value(t, load(sums.rows[r] + col), first + r, col);
      }
    }
  });
}

// What the columns of an int8 panel have in common: 16 from `col`.
struct Int8Columns {
  F16 scale;
  __m512i offset;  // what the + 128 of the activations adds to a sum

  Int8Columns(const PanelTask& t, int64_t col)
      : scale(load(t.col_scale + col)),
        offset(_mm512_slli_epi32(_mm512_loadu_si512(t.col_sum + col), 7)) {}

  F16 finish(const int32_t* sums, const F16& row_scale) const {
    const __m512i exact = _mm512_sub_epi32(_mm512_load_si512(sums), offset);
    return mul({_mm512_cvtepi32_ps(exact)}, mul(row_scale, scale));
  }
};

// value(row of the block, column, columns, row scale) goes to each output of a block.
template <class Value>
inline void write_int8(const PanelTask& t, int64_t first, int64_t rows, Value&& value) {
  for (int64_t col = 0; col < t.cols; col += 16) {
    const Int8Columns columns(t, col);
    for (int64_t r = 0; r < rows; ++r) {
      const F16 row_scale = set1(t.row_scale[(first + r) * t.row_scale_stride]);
      write_value(t, value(r, col, columns, row_scale), first + r, col);
    }
  }
}

// Few rows of int8 are quicker without tiles, and their sums are as exact.
inline bool is_for_vectors(const PanelTask& t) { return t.rows <= 2; }

void int8_gemm(const PanelTask& t) {
  if (is_for_vectors(t)) return few_rows_gemm<Int8Product>(t);
  shape_tiles();
  fetch_columns(t);
  Prefetch fetch = fetch_next(t);
  for_row_blocks(t.rows, [&](int64_t first, int64_t rows) {
    TileSums<int32_t> sums;
    multiply_block<Int8Tile>(t, t.a + first * t.a_stride, rows, fetch);
    store_tiles(sums.rows, sizeof sums.rows[0], rows > kTileRows);
    write_int8(t, first, rows, [&](int64_t r, int64_t col, const auto& columns, const F16& scale) {
      return columns.finish(sums.rows[r] + col, scale);
    });
  });
}

void w8a16_gemm(const PanelTask& t) {
  if (is_for_vectors(t)) return paired_gemm<few_rows_gemm<Int8Product>>(t);
  shape_tiles();
  fetch_columns(t);
  Prefetch fetch = fetch_next(t);
  for_row_blocks(t.rows, [&](int64_t first, int64_t rows) {
    TileSums<int32_t> coarse, fine;
    const uint8_t* a = t.a + first * t.a_stride;
    multiply_block<Int8Tile>(t, a, rows, fetch);
    store_tiles(coarse.rows, sizeof coarse.rows[0], rows > kTileRows);
    multiply_block<Int8Tile>(t, a + t.a_fine, rows, fetch);
    store_tiles(fine.rows, sizeof fine.rows[0], rows > kTileRows);
    write_int8(t, first, rows, [&](int64_t r, int64_t col, const auto& columns, const F16& scale) {
      return join_parts(columns.finish(coarse.rows[r] + col, scale),
                        columns.finish(fine.rows[r] + col, scale));
    });
  });
}
