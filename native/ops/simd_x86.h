// Steps on eight lanes that both x86 instruction sets share: the tail of a reduction, an 8 by 8
// transpose. Included inside an anonymous namespace.

// Lane i + lane i + 4, then i + 2, then i + 1: the same tree on every machine.
inline float reduce_add8(__m256 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline float reduce_max8(__m256 a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline __m256 join_halves(const float* low, const float* high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}

// Columns j to j + 3 of rows 0-3 (low half) and 4-7 (high half), written as four rows of dst.
inline void transpose4x8(const float* src, ptrdiff_t stride, float* dst, ptrdiff_t dst_stride) {
  const __m256 r0 = join_halves(src, src + 4 * stride);
  const __m256 r1 = join_halves(src + stride, src + 5 * stride);
  const __m256 r2 = join_halves(src + 2 * stride, src + 6 * stride);
  const __m256 r3 = join_halves(src + 3 * stride, src + 7 * stride);
  const __m256 low01 = _mm256_unpacklo_ps(r0, r1), high01 = _mm256_unpackhi_ps(r0, r1);
  const __m256 low23 = _mm256_unpacklo_ps(r2, r3), high23 = _mm256_unpackhi_ps(r2, r3);
  _mm256_storeu_ps(dst, _mm256_shuffle_ps(low01, low23, 0x44));
  _mm256_storeu_ps(dst + dst_stride, _mm256_shuffle_ps(low01, low23, 0xEE));
  _mm256_storeu_ps(dst + 2 * dst_stride, _mm256_shuffle_ps(high01, high23, 0x44));
  _mm256_storeu_ps(dst + 3 * dst_stride, _mm256_shuffle_ps(high01, high23, 0xEE));
}

// dst[j * dst_stride + i] = src[i * src_stride + j] for an 8 by 8 tile.
inline void transpose8(const float* src, ptrdiff_t src_stride, float* dst, ptrdiff_t dst_stride) {
  transpose4x8(src, src_stride, dst, dst_stride);
  transpose4x8(src + 4, src_stride, dst + 4 * dst_stride, dst_stride);
}
