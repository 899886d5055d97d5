// 16 lanes in plain C++, for any machine. Included inside an anonymous namespace by one file.
// With a hardware fused multiply-add (Arm) results equal those of the x86 vector units bit for bit.

struct F16 {
  float v[16];
};

struct I16 {
  int32_t v[16];
};

#define XDS_LANES for (int i = 0; i < 16; ++i)

inline F16 set1(float x) {
  F16 r;
  XDS_LANES r.v[i] = x;
  return r;
}
inline F16 load(const float* p) {
  F16 r;
  XDS_LANES r.v[i] = p[i];
  return r;
}
inline F16 load_n(const float* p, int64_t n) {
  F16 r;
  XDS_LANES r.v[i] = i < n ? p[i] : 0.0f;
  return r;
}
inline void store(float* p, const F16& a) { XDS_LANES p[i] = a.v[i]; }
inline void store_n(float* p, const F16& a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = a.v[i];
}
inline F16 add(F16 a, const F16& b) {
  XDS_LANES a.v[i] += b.v[i];
  return a;
}
inline F16 sub(F16 a, const F16& b) {
  XDS_LANES a.v[i] -= b.v[i];
  return a;
}
inline F16 mul(F16 a, const F16& b) {
  XDS_LANES a.v[i] *= b.v[i];
  return a;
}
inline F16 div(F16 a, const F16& b) {
  XDS_LANES a.v[i] /= b.v[i];
  return a;
}
// a * b + c, in one rounding where the machine has such an instruction.
inline F16 fma(F16 a, const F16& b, const F16& c) {
#if defined(FP_FAST_FMAF)
  XDS_LANES a.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
#else
  XDS_LANES a.v[i] = a.v[i] * b.v[i] + c.v[i];
#endif
  return a;
}
// a * b + c in one rounding on every machine.
inline F16 fused(F16 a, const F16& b, const F16& c) {
  XDS_LANES a.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
  return a;
}
inline F16 max(F16 a, const F16& b) {
  XDS_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F16 min(F16 a, const F16& b) {
  XDS_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F16 absolute(F16 a) {
  XDS_LANES a.v[i] = fabsf(a.v[i]);
  return a;
}
// Bit i: lane i of a >= lane i of b; NaN is neither.
inline uint32_t at_least(const F16& a, const F16& b) {
  uint32_t mask = 0;
  XDS_LANES mask |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
  return mask;
}
// `value` where x >= bound (or x is NaN), else 0.
inline F16 zero_below(F16 value, const F16& x, const F16& bound) {
  XDS_LANES value.v[i] = x.v[i] < bound.v[i] ? 0.0f : value.v[i];
  return value;
}
// 2^n for t = kRoundMagic + n.
inline F16 power_of_two(F16 t) {
  XDS_LANES t.v[i] = float_of((bits_of(t.v[i]) + 127u) << 23);
  return t;
}
inline float reduce_add(F16 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}
inline float reduce_max(F16 a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
  }
  return a.v[0];
}
// 16 pairs of bf16: the second (odd k) or first (even k) of each as float.
inline F16 pair_odd(const uint8_t* p) {
  F16 r;
  XDS_LANES {
    uint32_t bits;
    std::memcpy(&bits, p + 4 * i, 4);
    r.v[i] = float_of(bits & 0xFFFF0000u);
  }
  return r;
}
inline F16 pair_even(const uint8_t* p) {
  F16 r;
  XDS_LANES {
    uint32_t bits;
    std::memcpy(&bits, p + 4 * i, 4);
    r.v[i] = float_of(bits << 16);
  }
  return r;
}

// 16 bf16 as float, in an order that store_bf16_lanes undoes.
inline F16 load_bf16(const uint16_t* p) {
  F16 r;
  XDS_LANES r.v[i] = from_bf16(p[i]);
  return r;
}
inline void store_bf16_lanes(float* p, const F16& a) { store(p, a); }

// 16 int8 as float.
inline F16 load_s8(const int8_t* p) {
  F16 r;
  XDS_LANES r.v[i] = static_cast<float>(p[i]);
  return r;
}

// Whole numbers in [-128, 127] as int8.
inline void store_s8(int8_t* p, const F16& a) {
  XDS_LANES p[i] = static_cast<int8_t>(static_cast<int32_t>(a.v[i]));
}

inline I16 int_zero() { return I16{}; }
// acc + the dot product of each lane's four bytes with the four activation bytes.
inline I16 dot4(I16 acc, const uint8_t* a, const uint8_t* b) {
  const auto* x = reinterpret_cast<const int8_t*>(a);
  const auto* w = reinterpret_cast<const int8_t*>(b);
  XDS_LANES {
    acc.v[i] += x[0] * w[4 * i] + x[1] * w[4 * i + 1] + x[2] * w[4 * i + 2] + x[3] * w[4 * i + 3];
  }
  return acc;
}
// Exact int32 dot products as float; `col_sum` undoes the + 128 of kS8Offset.
inline F16 dot_result(const I16& acc, const int32_t* /*col_sum*/) {
  F16 r;
  XDS_LANES r.v[i] = static_cast<float>(acc.v[i]);
  return r;
}

inline I16 load_bytes(const uint8_t* p) {
  I16 r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline I16 low_nibbles(I16 bytes) {
  XDS_LANES bytes.v[i] &= 0x0F0F0F0F;
  return bytes;
}
inline I16 high_nibbles(I16 bytes) {
  XDS_LANES bytes.v[i] = (bytes.v[i] >> 4) & 0x0F0F0F0F;
  return bytes;
}
// acc + the dot product of each lane's four bytes below 16 with the four activation bytes; at most
// eight of them may be summed before nibble_result.
inline I16 nibble_dot(I16 acc, const I16& w, const int8_t* a) {
  XDS_LANES {
    for (int j = 0; j < 4; ++j) acc.v[i] += (w.v[i] >> (8 * j) & 15) * a[j];
  }
  return acc;
}
inline I16 signed_zero(int32_t /*offset*/) { return int_zero(); }
inline I16 load_signed(const uint8_t* p) { return load_bytes(p); }
inline I16 signed_dot(const I16& acc, const I16& w, const int8_t* a) {
  return dot4(acc, reinterpret_cast<const uint8_t*>(a), reinterpret_cast<const uint8_t*>(w.v));
}
inline F16 float_of(const I16& sum) { return dot_result(sum, nullptr); }

inline F16 nibble_result(const I16& acc) { return dot_result(acc, nullptr); }

// dst[j * dst_stride + i] = src[i * src_stride + j] for an 8 by 8 tile.
inline void transpose8(const float* src, ptrdiff_t src_stride, float* dst, ptrdiff_t dst_stride) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) dst[j * dst_stride + i] = src[i * src_stride + j];
  }
}

#undef XDS_LANES

constexpr bool kS8Offset = false;
constexpr int kFloatRows = 4;  // rows of a register tile of a float32 GEMM
constexpr int kBf16Rows = 4;
constexpr int kInt8Rows = 4;
constexpr int kDoubleRows = 0;
constexpr int kInt4Rows = 4;
constexpr int kW8A8Rows = 4;
constexpr int kW8A8WideRows = 4;
constexpr int kTileVecs = 1;  // 16-column vectors of a register tile
constexpr int kInt4WideRows = 1;
constexpr int kInt4FewRows = 0;
constexpr int kWideRows = 1;  // tiles of up to this many rows take both vectors of a panel
constexpr int kFewRows = 0;   // GEMMs of up to this many rows use wide tiles only
