// GEMM of 4-bit weights. Within a group of 32 k the integer sums are exact; groups are then added
// in float32, in ascending order, with multiply-adds that round once on every machine, so that the
// bits depend neither on the tile nor on the instruction set.

// The bf16 scales (or lows) of 16 outputs of a step.
inline F16 weight_factors(const uint8_t* pairs, int half) {
  return half == 0 ? pair_even(pairs) : pair_odd(pairs);
}

// acc + float(exact dot product of a group) * (activation scale * weight scale)
// + activation sum * weight low.
inline F16 add_scaled(const F16& acc, const F16& dot, const Int4Factors& a, const F16& scale,
                      const F16& low) {
  return fused(set1(a.sum), low, fused(dot, mul(set1(a.scale), scale), acc));
}

struct Int4Format {
  using Acc = F16;
  static constexpr int64_t kBytes = kInt4StepBytes;

  static Acc zero() { return set1(0.0f); }

  template <int R, int V>
  static void add_steps(Acc (&acc)[R][V], const PanelTask& t, int64_t first, int half,
                        Prefetch& fetch) {
    const uint8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = t.a + (first + r) * t.a_stride;
    const uint8_t* b = t.b;
    for (int64_t i = 0; i < t.steps; ++i, b += kInt4StepBytes) {
      fetch.step();
      add_group<R, V>(acc, rows, i, t.steps, b, half);
    }
  }

  // Adds group i of `groups`.
  template <int R, int V>
  static void add_group(Acc (&acc)[R][V], const uint8_t* const (&rows)[R], int64_t i,
                        int64_t groups, const uint8_t* b, int half) {
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
          const auto* a = reinterpret_cast<const int8_t*>(rows[r]) + i * kInt4Group + 8 * step;
          sums[r][v] = nibble_dot(sums[r][v], low, a);
          sums[r][v] = nibble_dot(sums[r][v], high, a + 4);
        }
      }
    }
    const uint8_t* scales = b + 4 * kStepBytes;
    for (int v = 0; v < V; ++v) {
      const F16 scale = weight_factors(scales, half + v);
      const F16 low = weight_factors(scales + 2 * kPanel, half + v);
      for (int r = 0; r < R; ++r) {
        acc[r][v] = add_scaled(acc[r][v], nibble_result(sums[r][v]),
                               int4_factors_of(rows[r], groups)[i], scale, low);
      }
    }
  }

  static F16 finish(const PanelTask&, const F16& acc, int64_t, int64_t) { return acc; }
};

void int4_gemm(const PanelTask& t) {
  if (t.rows <= kInt4FewRows) return panel_tiles<Int4Format, kInt4WideRows, kInt4WideRows, 1>(t);
  panel_tiles<Int4Format, kInt4Rows, kInt4WideRows, 1>(t);
}

// Quantize a row of n floats into ceil(n / 32) groups.
void prepare_int4(const float* x, int64_t n, uint8_t* out) {
  const int64_t groups = (n + kInt4Group - 1) / kInt4Group;
  auto* factors = reinterpret_cast<Int4Factors*>(out + groups * kInt4Group);
  for (int64_t i = 0; i < groups; ++i, out += kInt4Group) {
    const int64_t left = lesser(kInt4Group, n - i * kInt4Group);
    auto* values = reinterpret_cast<int8_t*>(out);
    std::memset(values, 0, kInt4Group);
    const float scale = quantize_row(x + i * kInt4Group, left, values);
    int32_t sum = 0;
    for (int64_t j = 0; j < kInt4Group; ++j) sum += values[j];
    factors[i] = {scale, scale * static_cast<float>(sum)};
  }
}
