// 16 lanes as one AVX-512 register. Included inside an anonymous namespace by one file.
// vdpbf16ps takes the odd element of a pair first, then the even one, as the other files do.
#include "simd_x86.h"

struct F16 {
  __m512 v;
};

struct I16 {
  __m512i v;
};

inline __mmask16 lane_mask(int64_t n) {  // lanes 0 to n - 1; 0 <= n <= 16
  return static_cast<__mmask16>((1u << n) - 1u);
}

inline F16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F16 load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lane_mask(n), p)}; }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, F16 a, int64_t n) { _mm512_mask_storeu_ps(p, lane_mask(n), a.v); }
inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 fused(F16 a, F16 b, F16 c) { return fma(a, b, c); }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 absolute(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline uint32_t at_least(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline F16 zero_below(F16 value, F16 x, F16 bound) {
  const __mmask16 keep = static_cast<__mmask16>(~_mm512_cmp_ps_mask(x.v, bound.v, _CMP_LT_OQ));
  return {_mm512_maskz_mov_ps(keep, value.v)};
}
inline F16 power_of_two(F16 t) {
  const __m512i biased = _mm512_add_epi32(_mm512_castps_si512(t.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
inline float reduce_add(F16 a) {
  return reduce_add8(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}
inline float reduce_max(F16 a) {
  return reduce_max8(_mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}

inline __m512i load_int(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline F16 pair_odd(const uint8_t* p) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(load_int(p), mask))};
}
inline F16 pair_even(const uint8_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(load_int(p), 16))};
}
inline __m512i broadcast4(const uint8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, 4);
  return _mm512_set1_epi32(quad);
}
// acc + the dot product of each lane's bf16 pair with the pair at `a`.
inline F16 dot2(F16 acc, const uint8_t* a, const uint8_t* b) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(broadcast4(a)),
                           reinterpret_cast<__m512bh>(load_int(b)))};
}

// 16 bf16 as float, in an order that store_bf16_lanes undoes.
inline F16 load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline void store_bf16_lanes(float* p, F16 a) { store(p, a); }

// 32 int8 as bf16; exact.
inline __m512i bf16_of_bytes(__m256i bytes) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// 16 int8 as float.
inline F16 load_s8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}

// Whole numbers in [-128, 127] as int8.
inline void store_s8(int8_t* p, F16 a) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a.v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline I16 int_zero() { return {_mm512_setzero_si512()}; }
// The activation bytes are unsigned (value + 128), the weights signed; wraps, never saturates.
inline I16 dot4(I16 acc, const uint8_t* a, const uint8_t* b) {
  return {_mm512_dpbusd_epi32(acc.v, broadcast4(a), load_int(b))};
}
inline F16 dot_result(I16 acc, const int32_t* col_sum) {
  const __m512i sums = _mm512_loadu_si512(col_sum);
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(acc.v, _mm512_slli_epi32(sums, 7)))};
}

inline I16 load_bytes(const uint8_t* p) { return {load_int(p)}; }
inline I16 low_nibbles(I16 bytes) {
  return {_mm512_and_si512(bytes.v, _mm512_set1_epi32(0x0F0F0F0F))};
}
inline I16 high_nibbles(I16 bytes) { return low_nibbles({_mm512_srli_epi32(bytes.v, 4)}); }
// Here the weights are the unsigned bytes, the activations signed.
inline I16 nibble_dot(I16 acc, I16 w, const int8_t* a) {
  return {_mm512_dpbusd_epi32(acc.v, w.v, broadcast4(reinterpret_cast<const uint8_t*>(a)))};
}
inline F16 nibble_result(I16 acc) { return {_mm512_cvtepi32_ps(acc.v)}; }

// Signed by signed bytes: weights become unsigned by + 128, which the sum's start undoes.
inline I16 signed_zero(int32_t offset) { return {_mm512_set1_epi32(offset)}; }
inline I16 load_signed(const uint8_t* p) {
  return {_mm512_xor_si512(load_int(p), _mm512_set1_epi8(static_cast<char>(0x80)))};
}
inline I16 signed_dot(I16 acc, I16 w, const int8_t* a) { return nibble_dot(acc, w, a); }
inline F16 float_of(I16 sum) { return {_mm512_cvtepi32_ps(sum.v)}; }

#define XDS_BF16_PAIRS 1  // dot2 exists: activations of bf16 GEMMs stay bf16

constexpr bool kS8Offset = true;
constexpr int kFloatRows = 12;  // 24 accumulators of 32 registers
constexpr int kBf16Rows = 12;
constexpr int kInt8Rows = 12;
constexpr int kDoubleRows = 12;
constexpr int kInt4Rows = 6;  // 6 integer and 6 float accumulators of each vector
constexpr int kInt4WideRows = 6;
constexpr int kInt4FewRows = 0;
constexpr int kW8A8Rows = 6;  // as of int4
constexpr int kW8A8WideRows = 6;
constexpr int kTileVecs = 2;
constexpr int kWideRows = 12;
constexpr int kFewRows = 0;
