// GEMM tiles. Each output has one accumulator that takes k in ascending order, so its bits depend
// neither on the tile it falls in nor on the other rows.

struct F32Product {
  using Acc = F16;
  static Acc zero() { return set1(0.0f); }

  template <int R, int V>
  static void step(Acc (&acc)[R][V], const uint8_t* const (&a)[R], int64_t i, const uint8_t* b) {
    F16 w[V];
    for (int v = 0; v < V; ++v) w[v] = load(reinterpret_cast<const float*>(b) + 16 * v);
    for (int r = 0; r < R; ++r) {
      const F16 x = set1(reinterpret_cast<const float*>(a[r])[i]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(x, w[v], acc[r][v]);
    }
  }
};

#if defined(XDS_BF16_PAIRS)
constexpr int64_t kBf16Item = 2;
struct Bf16Product {
  using Acc = F16;
  static Acc zero() { return set1(0.0f); }

  template <int R, int V>
  static void step(Acc (&acc)[R][V], const uint8_t* const (&a)[R], int64_t i, const uint8_t* b) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) acc[r][v] = dot2(acc[r][v], a[r] + 4 * i, b + 64 * v);
    }
  }
};
#else
constexpr int64_t kBf16Item = 4;  // activations are rounded to bf16 but kept as float
struct Bf16Product {
  using Acc = F16;
  static Acc zero() { return set1(0.0f); }

  template <int R, int V>
  static void half(Acc (&acc)[R][V], const uint8_t* const (&a)[R], int64_t i, const F16 (&w)[V]) {
    for (int r = 0; r < R; ++r) {
      const F16 x = set1(reinterpret_cast<const float*>(a[r])[i]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(x, w[v], acc[r][v]);
    }
  }

  template <int R, int V>
  static void step(Acc (&acc)[R][V], const uint8_t* const (&a)[R], int64_t i, const uint8_t* b) {
    F16 w[V];
    for (int v = 0; v < V; ++v) w[v] = pair_odd(b + 64 * v);
    half(acc, a, 2 * i + 1, w);
    for (int v = 0; v < V; ++v) w[v] = pair_even(b + 64 * v);
    half(acc, a, 2 * i, w);
  }
};
#endif

struct Int8Product {
  using Acc = I16;
  static Acc zero() { return int_zero(); }

  template <int R, int V>
  static void step(Acc (&acc)[R][V], const uint8_t* const (&a)[R], int64_t i, const uint8_t* b) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) acc[r][v] = dot4(acc[r][v], a[r] + 4 * i, b + 64 * v);
    }
  }
};

// Brings lines into the cache while something else is computed, some with every k-step.
class Prefetch {
 public:
  Prefetch(const uint8_t* begin, int64_t bytes, int64_t lines_per_step)
      : next_(begin), end_(begin == nullptr ? begin : begin + bytes), per_step_(lines_per_step) {}

  void step() {
    for (int64_t line = 0; line < per_step_ && next_ != end_; ++line, next_ += 64) {
      __builtin_prefetch(next_, 0, 2);
    }
  }

 private:
  const uint8_t* next_;
  const uint8_t* end_;
  int64_t per_step_;
};

template <class Product, int R, int V, class Fetch>
inline void accumulate(typename Product::Acc (&acc)[R][V], const uint8_t* a, ptrdiff_t a_stride,
                       const uint8_t* b, ptrdiff_t b_stride, int64_t steps, Fetch& fetch) {
  const uint8_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = a + r * a_stride;
  Fetch ahead = fetch;  // in registers, as `acc` is then, too
  for (int64_t i = 0; i < steps; ++i, b += b_stride) {
    ahead.step();
    Product::step(acc, rows, i, b);
  }
  fetch = ahead;
}

template <int N>
using Int = std::integral_constant<int, N>;

// body(Int<R>, first) for tiles of R <= Max rows that cover [0, rows).
template <int Max, class Body>
inline void last_rows(int64_t first, int64_t left, Body& body) {
  if constexpr (Max > 0) {
    if (left == Max) return body(Int<Max>{}, first);
    last_rows<Max - 1>(first, left, body);
  }
}

template <int Max, class Body>
inline void for_row_tiles(int64_t rows, Body&& body) {
  int64_t first = 0;
  for (; rows - first >= Max; first += Max) body(Int<Max>{}, first);
  last_rows<Max - 1>(first, rows - first, body);
}

// An int8 sum with the scales of its row and columns.
inline F16 scale_int8(const PanelTask& t, const I16& acc, int64_t row, int64_t col) {
  const F16 scale = mul(set1(t.row_scale[row * t.row_scale_stride]), load(t.col_scale + col));
  return mul(dot_result(acc, t.col_sum + col), scale);
}

// Results of 16 columns from `col`, to which the bias is added.
inline void write_value(const PanelTask& t, F16 value, int64_t row, int64_t col) {
  const int64_t lanes = t.cols - col;
  float* out = t.c + row * t.c_stride + col;
  if (lanes >= 16) {
    if (t.bias != nullptr) value = add(value, load(t.bias + col));
    return store(out, value);
  }
  if (t.bias != nullptr) value = add(value, load_n(t.bias + col, lanes));
  store_n(out, value, lanes);
}

// The scales and sums of an int8 panel lie apart from it and are needed last.
inline void fetch_columns(const PanelTask& t) {
  if (t.col_scale == nullptr) return;
  for (int64_t col = 0; col < kPanel; col += 16) {
    __builtin_prefetch(t.col_scale + col);
    __builtin_prefetch(t.col_sum + col);
  }
}

// How a panel is multiplied: Format has the type Acc of an accumulator, its zero(), the bytes kBytes
// of a panel's step, add_steps<R, V>(acc, task, first row, half, fetch) and finish(task, acc, row,
// col). A tile is R rows of V vectors from vector `half` on.
template <class Format, int R, int V>
inline void panel_tile(const PanelTask& t, int64_t first, int half, Prefetch& fetch) {
  typename Format::Acc acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = Format::zero();
  }
  Format::template add_steps<R, V>(acc, t, first, half, fetch);
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      const int64_t col = 16 * (half + v);
      if (col < t.cols) write_value(t, Format::finish(t, acc[r][v], first + r, col), first + r, col);
    }
  }
}

// Tiles of up to WideRows rows are as wide as the panel, higher ones Vecs vectors.
template <class Format, int Rows, int WideRows, int Vecs>
void panel_tiles(const PanelTask& t) {
  constexpr int64_t kLines = Format::kBytes / 64;
  fetch_columns(t);
  const bool is_one_pass = t.rows <= WideRows;
  Prefetch fetch(t.next, t.steps * Format::kBytes, is_one_pass ? kLines : kLines / 2);
  for_row_tiles<Rows>(t.rows, [&](auto size, int64_t first) {
    constexpr int R = size;
    constexpr int V = R <= WideRows ? 2 : Vecs;
    for (int half = 0; half < 2 && 16 * half < t.cols; half += V) {
      panel_tile<Format, R, V>(t, first, half, fetch);
    }
  });
}

// Formats of one accumulator for all of k.
template <class Product>
struct Plain : Product {
  static constexpr int64_t kBytes = kStepBytes;

  template <int R, int V>
  static void add_steps(typename Product::Acc (&acc)[R][V], const PanelTask& t, int64_t first,
                        int half, Prefetch& fetch) {
    accumulate<Product, R, V>(acc, t.a + first * t.a_stride, t.a_stride, t.b + 64 * half,
                              kStepBytes, t.steps, fetch);
  }

  static F16 finish(const PanelTask&, const F16& acc, int64_t, int64_t) { return acc; }

  static F16 finish(const PanelTask& t, const I16& acc, int64_t row, int64_t col) {
    return scale_int8(t, acc, row, col);
  }
};

// Few rows: the panel comes from memory, so read it once, in order, with wide tiles.
template <class Product>
void few_rows_gemm(const PanelTask& t) {
  panel_tiles<Plain<Product>, kWideRows, kWideRows, kTileVecs>(t);
}

template <class Product, int Rows>
void panel_gemm(const PanelTask& t) {
  if (t.rows <= kFewRows) return few_rows_gemm<Product>(t);
  panel_tiles<Plain<Product>, Rows, kWideRows, kTileVecs>(t);
}

// Activations of 15 bits are 128 * coarse + fine, so they are two int8 products with one weight.
inline F16 join_parts(const F16& coarse, const F16& fine) {
  return add(coarse, mul(fine, set1(1.0f / 128)));
}

template <void (*gemm)(const PanelTask&)>
void paired_gemm(const PanelTask& t) {
  alignas(64) float coarse[kRowChunk * kPanel];
  alignas(64) float fine[kRowChunk * kPanel];
  PanelTask part = t;
  part.bias = nullptr;
  part.c_stride = kPanel;
  part.c = coarse;
  gemm(part);
  part.a += t.a_fine;
  part.next = nullptr;
  part.c = fine;
  gemm(part);
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t col = 0; col < t.cols; col += 16) {
      const int64_t at = r * kPanel + col;
      write_value(t, join_parts(load(coarse + at), load(fine + at)), r, col);
    }
  }
}
