// GEMM of 4-bit weights. Within a group of 32 k the integer sums are exact; groups are then added
// in float32, in ascending order, products and sums rounded one after the other, so that the bits
// depend neither on the tile nor on whether the machine has a fused multiply-add.

// acc += float(exact dot product of group i) * (activation scale * weight scale), then
// += activation sum * weight low, for R rows.
template <int R, int V>
inline void add_group(F16 (&acc)[R][V], const Int4Activations* const (&a)[R], int64_t i,
                      const uint8_t* b, int half) {
  I16 sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) sums[r][v] = int_zero();
  }
#pragma GCC unroll 1  // unrolled, compilers regroup the integer sums and spill them
  for (int step = 0; step < 4; ++step) {
    for (int v = 0; v < V; ++v) {
      const I16 bytes = load_bytes(b + kStepBytes * step + 64 * (half + v));
      const I16 low = low_nibbles(bytes), high = high_nibbles(bytes);
      for (int r = 0; r < R; ++r) {
        sums[r][v] = nibble_dot(sums[r][v], low, a[r][i].values + 8 * step);
        sums[r][v] = nibble_dot(sums[r][v], high, a[r][i].values + 8 * step + 4);
      }
    }
  }
  const uint8_t* scales = b + 4 * kStepBytes;
  const uint8_t* lows = scales + 2 * kPanel;
  for (int v = 0; v < V; ++v) {
    const bool is_first = half + v == 0;
    const F16 scale = is_first ? pair_even(scales) : pair_odd(scales);
    const F16 low = is_first ? pair_even(lows) : pair_odd(lows);
    for (int r = 0; r < R; ++r) {
      const F16 product = mul(nibble_result(sums[r][v]), mul(set1(a[r][i].scale), scale));
      acc[r][v] = add(add(acc[r][v], product), mul(set1(a[r][i].sum), low));
    }
  }
}

template <int R, int V>
inline void int4_tile(const PanelTask& t, int64_t first, int half, Prefetch& fetch) {
  const Int4Activations* rows[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = reinterpret_cast<const Int4Activations*>(t.a + (first + r) * t.a_stride);
  }
  F16 acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = set1(0.0f);
  }
  const uint8_t* b = t.b;
  for (int64_t i = 0; i < t.steps; ++i, b += kInt4StepBytes) {
    fetch.step();
    add_group<R, V>(acc, rows, i, b, half);
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      if (16 * (half + v) < t.cols) write_out(t, acc[r][v], first + r, 16 * (half + v));
    }
  }
}

template <int Rows>
void int4_tiles(const PanelTask& t) {
  constexpr int64_t kLines = kInt4StepBytes / 64;
  const bool is_one_pass = t.rows <= kInt4WideRows;
  Prefetch fetch(t.next, t.steps * kInt4StepBytes, is_one_pass ? kLines : kLines / 2);
  for_row_tiles<Rows>(t.rows, [&](auto size, int64_t first) {
    constexpr int R = size;
    constexpr int V = R <= kInt4WideRows ? 2 : 1;
    for (int half = 0; half < 2 && 16 * half < t.cols; half += V) {
      int4_tile<R, V>(t, first, half, fetch);
    }
  });
}

void int4_gemm(const PanelTask& t) {
  if (t.rows <= kInt4FewRows) return int4_tiles<kInt4WideRows>(t);
  int4_tiles<kInt4Rows>(t);
}

// Quantize a row of n floats into ceil(n / 32) groups.
void prepare_int4(const float* x, int64_t n, Int4Activations* out) {
  for (int64_t i = 0; i < n; i += kInt4Group, ++out) {
    const int64_t left = lesser(kInt4Group, n - i);
    int8_t values[kInt4Group] = {};
    out->scale = quantize_row(x + i, left, values);
    int32_t sum = 0;
    for (int64_t j = 0; j < kInt4Group; ++j) sum += values[j];
    out->sum = out->scale * static_cast<float>(sum);
    std::memcpy(out->values, values, sizeof values);
  }
}
