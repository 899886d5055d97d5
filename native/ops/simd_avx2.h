// 16 lanes as two AVX2 registers. Included inside an anonymous namespace by one file.
#include "simd_x86.h"

struct F16 {
  __m256 lo, hi;
};

struct I16 {
  __m256i lo, hi;
};

inline __m256i lane_mask(int64_t n) {  // lanes 0 to n - 1 of 8; n may be negative or above 8
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes);
}

inline F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F16 load_n(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, lane_mask(n)), _mm256_maskload_ps(p + 8, lane_mask(n - 8))};
}
inline void store(float* p, F16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_n(float* p, F16 a, int64_t n) {
  _mm256_maskstore_ps(p, lane_mask(n), a.lo);
  _mm256_maskstore_ps(p + 8, lane_mask(n - 8), a.hi);
}
inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F16 fused(F16 a, F16 b, F16 c) { return fma(a, b, c); }
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 absolute(F16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline uint32_t at_least(F16 a, F16 b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
  return static_cast<uint32_t>(low | high << 8);
}
inline F16 zero_below(F16 value, F16 x, F16 bound) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.lo, bound.lo, _CMP_LT_OQ), value.lo),
          _mm256_andnot_ps(_mm256_cmp_ps(x.hi, bound.hi, _CMP_LT_OQ), value.hi)};
}
inline __m256 power_of_two8(__m256 t) {
  const __m256i biased = _mm256_add_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline F16 power_of_two(F16 t) { return {power_of_two8(t.lo), power_of_two8(t.hi)}; }
inline float reduce_add(F16 a) { return reduce_add8(_mm256_add_ps(a.lo, a.hi)); }
inline float reduce_max(F16 a) { return reduce_max8(_mm256_max_ps(a.lo, a.hi)); }

inline __m256i load_int(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline F16 pair_odd(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(load_int(p), mask)),
          _mm256_castsi256_ps(_mm256_and_si256(load_int(p + 32), mask))};
}
inline F16 pair_even(const uint8_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(load_int(p), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(load_int(p + 32), 16))};
}

// 16 bf16 as float in the order that costs least here: the even ones, then the odd ones.
inline F16 load_bf16(const uint16_t* p) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(pairs, mask))};
}
// Stores lanes ordered as by load_bf16 in their natural order.
inline void store_bf16_lanes(float* p, F16 a) {
  const __m256 low = _mm256_unpacklo_ps(a.lo, a.hi), high = _mm256_unpackhi_ps(a.lo, a.hi);
  _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

// 16 int8 as float.
inline F16 load_s8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
}

// Whole numbers in [-128, 127] as int8.
inline void store_s8(int8_t* p, F16 a) {
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi));
  const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered),
                                        _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline I16 int_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
// |a| * sign(w, a) = a * w; pairs stay below 2 * 127 * 127 < 2^15, so nothing saturates.
inline __m256i dot4_8(__m256i acc, __m256i a, __m256i w) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I16 dot4(I16 acc, const uint8_t* a, const uint8_t* b) {
  int32_t quad;
  std::memcpy(&quad, a, 4);
  const __m256i x = _mm256_set1_epi32(quad);
  return {dot4_8(acc.lo, x, load_int(b)), dot4_8(acc.hi, x, load_int(b + 32))};
}
inline F16 dot_result(I16 acc, const int32_t* /*col_sum*/) {
  return {_mm256_cvtepi32_ps(acc.lo), _mm256_cvtepi32_ps(acc.hi)};
}

inline I16 load_bytes(const uint8_t* p) { return {load_int(p), load_int(p + 32)}; }
inline I16 low_nibbles(I16 bytes) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(bytes.lo, mask), _mm256_and_si256(bytes.hi, mask)};
}
inline I16 high_nibbles(I16 bytes) {
  return low_nibbles({_mm256_srli_epi16(bytes.lo, 4), _mm256_srli_epi16(bytes.hi, 4)});
}
// Sums of pairs in 16 bits: eight of at most 2 * 15 * 127 stay below 2^15.
inline I16 nibble_dot(I16 acc, I16 w, const int8_t* a) {
  int32_t quad;
  std::memcpy(&quad, a, 4);
  const __m256i x = _mm256_set1_epi32(quad);
  return {_mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(w.lo, x)),
          _mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(w.hi, x))};
}
inline F16 nibble_result(I16 acc) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_cvtepi32_ps(_mm256_madd_epi16(acc.lo, ones)),
          _mm256_cvtepi32_ps(_mm256_madd_epi16(acc.hi, ones))};
}

inline I16 signed_zero(int32_t /*offset*/) { return int_zero(); }
inline I16 load_signed(const uint8_t* p) { return load_bytes(p); }
inline I16 signed_dot(I16 acc, I16 w, const int8_t* a) {
  int32_t quad;
  std::memcpy(&quad, a, 4);
  const __m256i x = _mm256_set1_epi32(quad);
  return {dot4_8(acc.lo, x, w.lo), dot4_8(acc.hi, x, w.hi)};
}
inline F16 float_of(I16 sum) { return {_mm256_cvtepi32_ps(sum.lo), _mm256_cvtepi32_ps(sum.hi)}; }

constexpr bool kS8Offset = false;
constexpr int kFloatRows = 6;  // 12 accumulators of 16 registers
constexpr int kBf16Rows = 5;   // one more register for the mask
constexpr int kInt8Rows = 4;   // and for |a| and the ones
constexpr int kDoubleRows = 3;  // attention tiles of up to this many rows take two vectors
constexpr int kInt4Rows = 5;
constexpr int kInt4WideRows = 2;
constexpr int kInt4FewRows = 4;
constexpr int kW8A8Rows = 4;
constexpr int kW8A8WideRows = 1;
constexpr int kTileVecs = 1;
constexpr int kWideRows = 2;
constexpr int kFewRows = 12;
