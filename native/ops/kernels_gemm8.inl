// GEMM of int8 weights and activations that have a scale for every 64 k. The integer sum of a group
// is exact, also as a float; groups are then added in ascending order, with multiply-adds that round
// once on every machine, so that the bits depend neither on the tile nor on the instruction set.

struct W8A8Format {
  using Acc = F16;
  static constexpr int64_t kBytes = kStepBytes;
  static constexpr int64_t kGroupSteps = kInt8Group / 4;

  static Acc zero() { return set1(0.0f); }

  template <int R, int V>
  static void add_steps(Acc (&acc)[R][V], const PanelTask& t, int64_t first, int half,
                        Prefetch& fetch) {
    const uint8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = t.a + (first + r) * t.a_stride;
    const int64_t groups = (t.steps + kGroupSteps - 1) / kGroupSteps;
    const uint8_t* b = t.b + 64 * half;
    Prefetch ahead = fetch;  // in registers
    for (int64_t i = 0; i < groups; ++i, b += kGroupSteps * kStepBytes) {
      const int64_t steps = lesser(kGroupSteps, t.steps - i * kGroupSteps);
      add_group<R, V>(acc, rows, i, groups, b, steps, ahead);
    }
    fetch = ahead;
  }

  // Adds group i, `steps` k-steps of which exist.
  template <int R, int V>
  static void add_group(Acc (&acc)[R][V], const uint8_t* const (&rows)[R], int64_t i,
                        int64_t groups, const uint8_t* b, int64_t steps, Prefetch& fetch) {
    I16 sums[R][V];
    for (int r = 0; r < R; ++r) {
      const I16 start = signed_zero(int8_factors_of(rows[r], groups)[i].offset);
      for (int v = 0; v < V; ++v) sums[r][v] = start;
    }
    for (int64_t step = 0; step < steps; ++step, b += kStepBytes) {
      fetch.step();
      for (int v = 0; v < V; ++v) {
        const I16 w = load_signed(b + 64 * v);
        for (int r = 0; r < R; ++r) {
          const auto* a = reinterpret_cast<const int8_t*>(rows[r]) + i * kInt8Group + 4 * step;
          sums[r][v] = signed_dot(sums[r][v], w, a);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const F16 scale = set1(int8_factors_of(rows[r], groups)[i].scale);
      for (int v = 0; v < V; ++v) acc[r][v] = fused(float_of(sums[r][v]), scale, acc[r][v]);
    }
  }

  static F16 finish(const PanelTask& t, const F16& acc, int64_t, int64_t col) {
    return mul(acc, load(t.col_scale + col));
  }
};

void w8a8_gemm(const PanelTask& t) { panel_tiles<W8A8Format, kW8A8Rows, kW8A8WideRows, 1>(t); }

// Quantize a row of n floats into ceil(n / 64) groups.
void prepare_w8a8(const float* x, int64_t n, uint8_t* out) {
  const int64_t groups = (n + kInt8Group - 1) / kInt8Group;
  auto* factors = reinterpret_cast<Int8Factors*>(out + groups * kInt8Group);
  for (int64_t i = 0; i < groups; ++i, out += kInt8Group) {
    const int64_t left = lesser(kInt8Group, n - i * kInt8Group);
    const float* from = x + i * kInt8Group;
    const Int8Scale scale = int8_scale(largest_magnitude(from, left));
    F16 sum = set1(0.0f);
    for (int64_t j = 0; j < kInt8Group; j += 16) {
      const F16 given = j < left ? load_up_to(from + j, left - j) : set1(0.0f);
      const F16 value = round_within(mul(given, set1(scale.inverse)), 127.0f);
      store_s8(reinterpret_cast<int8_t*>(out) + j, value);
      sum = add(sum, value);  // whole numbers, exact
    }
    factors[i] = {scale.scale, -128 * static_cast<int32_t>(reduce_add(sum))};
  }
}
