// The softmax of a partition and the rounding of its weights in two passes over the scores. The bits
// are those of PartScales::softmax and of rounding its result.

// 16 scores from position `at` of a partition, scaled.
inline F16 scaled_scores(const float* scores, const NoScales&, int64_t at, float scale) {
  return mul(load(scores + at), set1(scale));
}
inline F16 scaled_scores(const float* scores, const PartScales& scales, int64_t at, float scale) {
  return mul(mul(load(scores + at), load(scales.keys + at)), set1(scale));
}
inline F16 scaled_weights(const F16& weights, const NoScales&, int64_t) { return weights; }
inline F16 scaled_weights(const F16& weights, const PartScales& scales, int64_t at) {
  return mul(weights, load(scales.values + at));
}

// keep(at, bf16 weights of 16 positions, zero from `count` on) in order; the scores are read before.
template <class PartScales, class Keep>
inline PartSoftmax round_softmax(const float* scores, const PartScales& scales, int64_t count,
                                 float scale, Keep&& keep) {
  const int64_t whole = count / 16 * 16;
  const __mmask16 rest = lane_mask(count - whole);
  auto last = [&] {
    const F16 scaled = scaled_scores(scores, scales, whole, scale);
    return F16{_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), rest, scaled.v)};
  };
  F16 largest = set1(-INFINITY);
  for (int64_t i = 0; i < whole; i += 16) {
    largest = max(largest, scaled_scores(scores, scales, i, scale));
  }
  if (rest != 0) largest = max(largest, last());
  const float top = reduce_max(largest);
  F16 sum = set1(0.0f);
  auto weigh = [&](const F16& scaled, int64_t at, __mmask16 lanes) {
    const F16 weight = exp16(sub(scaled, set1(top)));
    sum = add(sum, weight);
    const __m512 product = scaled_weights(weight, scales, at).v;
    keep(at, reinterpret_cast<__m256i>(_mm512_maskz_cvtneps_pbh(lanes, product)));
  };
  for (int64_t i = 0; i < whole; i += 16) {
    weigh(scaled_scores(scores, scales, i, scale), i, 0xFFFF);
  }
  if (rest != 0) weigh(last(), whole, rest);
  return {top, reduce_add(sum)};
}
