// Kernels on one row. Sums run in 16 lanes, reduced by a fixed tree.

// x with up to 16 lanes left, the rest zero.
inline F16 load_up_to(const float* p, int64_t left) {
  return left >= 16 ? load(p) : load_n(p, left);
}

inline void store_up_to(float* p, const F16& a, int64_t left) {
  if (left >= 16) return store(p, a);
  store_n(p, a, left);
}

// e^x within 2 ulp; below -87.3 it is 0, above 88 it stays finite, NaN stays NaN.
// Range reduction by ln 2 in two parts and a degree-5 polynomial (S. Moshier, Cephes, expf).
inline F16 exp16(const F16& x) {
  const F16 low = set1(-87.33654f), magic = set1(kRoundMagic);
  const F16 y = min(set1(88.0f), max(low, x));
  const F16 shifted = fma(y, set1(1.44269504f), magic);
  const F16 n = sub(shifted, magic);
  F16 r = fma(n, set1(-0.693359375f), y);
  r = fma(n, set1(2.12194440e-4f), r);
  F16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return zero_below(mul(p, power_of_two(shifted)), x, low);
}

inline F16 sigmoid16(const F16& x) {
  const F16 one = set1(1.0f);
  return div(one, add(one, exp16(sub(set1(0.0f), x))));
}

void prepare_bf16(const float* x, int64_t n, void* out) {
  const int64_t padded = (n + 1) / 2 * 2;
  if constexpr (kBf16Item == 2) {
    auto* bits = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < n; ++i) bits[i] = to_bf16(x[i]);
    for (int64_t i = n; i < padded; ++i) bits[i] = 0;
  } else {
    auto* values = static_cast<float*>(out);
    for (int64_t i = 0; i < n; ++i) values[i] = from_bf16(to_bf16(x[i]));
    for (int64_t i = n; i < padded; ++i) values[i] = 0.0f;
  }
}

// The nearest whole number within [-bound, bound]; NaN becomes -bound.
inline F16 round_within(const F16& x, float bound) {
  const F16 magic = set1(kRoundMagic);
  const F16 clamped = min(max(x, set1(-bound)), set1(bound));
  return sub(add(clamped, magic), magic);
}

inline void store_s8_up_to(int8_t* p, const F16& a, int64_t left) {
  if (left >= 16) return store_s8(p, a);
  int8_t lanes[16];
  store_s8(lanes, a);
  for (int64_t i = 0; i < left; ++i) p[i] = lanes[i];
}

inline float largest_magnitude(const float* x, int64_t n) {
  F16 largest = set1(0.0f);
  for (int64_t i = 0; i < n; i += 16) largest = max(largest, absolute(load_up_to(x + i, n - i)));
  return reduce_max(largest);
}

float quantize_row(const float* x, int64_t n, int8_t* out) {
  const Int8Scale scale = int8_scale(largest_magnitude(x, n));
  const F16 inverse = set1(scale.inverse);
  for (int64_t i = 0; i < n; i += 16) {
    const F16 value = round_within(mul(load_up_to(x + i, n - i), inverse), 127.0f);
    store_s8_up_to(out + i, value, n - i);
  }
  return scale.scale;
}

float split_row(const float* x, int64_t n, int8_t* coarse, int8_t* fine) {
  const float top = largest_magnitude(x, n);
  const F16 inverse = set1(top < kTinyRow ? 0.0f : kSplitMax / top);
  for (int64_t i = 0; i < n; i += 16) {
    const F16 value = round_within(mul(load_up_to(x + i, n - i), inverse), kSplitMax);
    const F16 high = round_within(mul(value, set1(1.0f / 128)), 127.0f);
    store_s8_up_to(coarse + i, high, n - i);
    store_s8_up_to(fine + i, sub(value, mul(high, set1(128.0f))), n - i);
  }
  return top < kTinyRow ? 0.0f : top / kSplitMax * 128.0f;
}

void rms_norm_row(const float* x, const float* weight, int64_t n, float eps, float* out) {
  F16 sum = set1(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const F16 v = load_up_to(x + i, n - i);
    sum = fma(v, v, sum);
  }
  const float scale = 1.0f / sqrtf(reduce_add(sum) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void add_row(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

void axpy_row(float factor, const float* x, int64_t n, float* sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * x[i];
}

void silu_mul_row(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const F16 g = load_up_to(gate + i, n - i);
    const F16 silu = div(g, add(set1(1.0f), exp16(sub(set1(0.0f), g))));
    store_up_to(out + i, mul(silu, load_up_to(up + i, n - i)), n - i);
  }
}

void rope_row(const float* x, const float* cos_sin, int64_t half, int64_t n, float* out) {
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t left = half - i;
    const F16 first = load_up_to(x + i, left), second = load_up_to(x + i + half, left);
    const F16 cos = load_up_to(cos_sin + i, left), sin = load_up_to(cos_sin + half + i, left);
    store_up_to(out + i, sub(mul(first, cos), mul(second, sin)), left);
    store_up_to(out + i + half, add(mul(second, cos), mul(first, sin)), left);
  }
  for (int64_t i = 2 * half; i < n; ++i) out[i] = x[i];
}

void to_bf16_row(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(x[i]);
}

void from_bf16_row(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(x[i]);
}

float max_row(const float* x, int64_t n) {
  float largest = -INFINITY;
  F16 lanes = set1(-INFINITY);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) lanes = max(load(x + i), lanes);
  for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  const float vector_max = reduce_max(lanes);
  return vector_max > largest ? vector_max : largest;
}

void exp_row(const float* x, int64_t n, float shift, float divisor, float* out) {
  const F16 s = set1(shift), d = set1(divisor);
  for (int64_t i = 0; i < n; i += 16) {
    store_up_to(out + i, exp16(div(sub(load_up_to(x + i, n - i), s), d)), n - i);
  }
}

float sum_row(const float* x, int64_t n) {
  F16 sum = set1(0.0f);
  for (int64_t i = 0; i < n; i += 16) sum = add(sum, load_up_to(x + i, n - i));
  return reduce_add(sum);
}

void softmax_row(const float* x, int64_t n, float* out) {
  exp_row(x, n, max_row(x, n), 1.0f, out);
  const float sum = sum_row(out, n);
  for (int64_t i = 0; i < n; ++i) out[i] /= sum;
}

void sigmoid_row(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    store_up_to(out + i, sigmoid16(load_up_to(x + i, n - i)), n - i);
  }
}

float read_floats(const float* x, int64_t n) {
  F16 sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (int64_t i = 0; i + 64 <= n; i += 64) {
    for (int j = 0; j < 4; ++j) sum[j] = add(sum[j], load(x + i + 16 * j));
  }
  return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}
