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
constexpr int64_t kBlockRows = 2 * kTileRows;
static_assert(kRowSlack == kBlockRows - 1);

struct Bf16Tile {
  using Element = float;
  static void dot_first() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  static void dot_second() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  static F16 result(const float* p) { return load(p); }
};

struct Int8Tile {
  using Element = int32_t;
  static void dot_first() {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
  }
  static void dot_second() {
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  static I16 result(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
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
  alignas(64) uint8_t padded_a[kBlockRows * 64] = {};
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

template <class Tile>
inline void write_tiles(const PanelTask& t, int64_t first, int64_t rows) {
  using Element = typename Tile::Element;
  const bool is_whole = rows == kBlockRows && t.cols == kPanel;
  if (std::is_same_v<Element, float> && is_whole && t.bias == nullptr) {
    return store_tiles(t.c + first * t.c_stride, t.c_stride * 4, true);
  }
  alignas(64) Element block[kBlockRows * kPanel];
  store_tiles(block, kPanel * sizeof(Element), rows > kTileRows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t col = 0; col < t.cols; col += 16) {
      write_out(t, Tile::result(block + r * kPanel + col), first + r, col);
    }
  }
}

template <class Tile>
void tile_gemm(const PanelTask& t) {
  shape_tiles();
  fetch_columns(t);
  const bool is_one_pass = t.rows <= kBlockRows;
  Prefetch fetch(t.next, t.steps * kStepBytes, kTileSteps * (is_one_pass ? kStepBytes / 64 : 1));
  const ptrdiff_t a_stride = t.rows == 1 ? 0 : t.a_stride;  // one row is read 16 times
  for (int64_t first = 0; first < t.rows; first += kBlockRows) {
    const int64_t rows = lesser(kBlockRows, t.rows - first);
    const uint8_t* a = t.a + first * t.a_stride;
    const uint8_t* b = t.b;
    clear_tiles();
    int64_t left = t.steps;
    for (; left >= kTileSteps; left -= kTileSteps, a += 64, b += kTileSteps * kStepBytes) {
      fetch.step();
      dot_tiles<Tile>(a, a_stride, rows > kTileRows, b);
    }
    if (left > 0) dot_last_tiles<Tile>(a, t.a_stride, rows, b, left);
    write_tiles<Tile>(t, first, rows);
  }
}

// Few rows of int8 are quicker without tiles, and their sums are as exact.
void int8_gemm(const PanelTask& t) {
  constexpr int64_t kVectorRows = 2;
  if (t.rows <= kVectorRows) return panel_tiles<Int8Product, kWideRows>(t);
  tile_gemm<Int8Tile>(t);
}
