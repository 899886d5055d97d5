// The softmax of a partition, with weights rounded to bf16, in two passes over the scores. As eight
// bits of a weight are kept, 2^x is a polynomial of degree four, within 3e-6 of the value (ours, fitted
// for the least relative error on [-1/2, 1/2]); many rows and few take the same steps, so they have
// the same bits.

constexpr float kLog2E = 1.44269504f;
constexpr float kExp2[] = {0.99999926f, 0.69312181f, 0.24024745f, 0.055917860f, 0.0095701006f};

// 16 scores from position `at` of a partition; those of int8 keys are multiplied by their scales.
inline F16 true_scores(const float* scores, const NoScales&, int64_t at) {
  return load(scores + at);
}
inline F16 true_scores(const float* scores, const PartScales& scales, int64_t at) {
  return mul(load(scores + at), load(scales.keys + at));
}
inline F16 scaled_weights(const F16& weights, const NoScales&, int64_t) { return weights; }
inline F16 scaled_weights(const F16& weights, const PartScales& scales, int64_t at) {
  return mul(weights, load(scales.values + at));
}

// 2^(x * factor) for x * factor <= 0 and factor > 2^-100; 0 below 2^-149, NaN stays NaN.
inline F16 exp2_16(const F16& x, float factor) {
  const F16 by = set1(factor), magic = set1(kRoundMagic);
  const F16 y = max(set1(-150.0f / factor), x);
  const F16 n = sub(fma(y, by, magic), magic);
  const F16 r{_mm512_fmsub_ps(y.v, by.v, n.v)};  // in [-1/2, 1/2]
  F16 p = set1(kExp2[4]);
  for (int i = 3; i >= 0; --i) p = fma(p, r, set1(kExp2[i]));
  return {_mm512_scalef_ps(p.v, n.v)};
}

// keep(at, bf16 weights of 16 positions, zero from `count` on) in order; the scores are read before.
template <class Factors, class Keep>
inline PartSoftmax round_softmax(const float* scores, const Factors& scales, int64_t count,
                                 float scale, Keep&& keep) {
  const int64_t whole = count / 16 * 16;
  const __mmask16 rest = lane_mask(count - whole);
  auto last = [&] {
    const F16 found = true_scores(scores, scales, whole);
    return F16{_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), rest, found.v)};
  };
  F16 largest = set1(-INFINITY);
  for (int64_t i = 0; i < whole; i += 16) largest = max(largest, true_scores(scores, scales, i));
  if (rest != 0) largest = max(largest, last());
  const float top = reduce_max(largest);
  F16 sum = set1(0.0f);
  auto weigh = [&](const F16& found, int64_t at, __mmask16 lanes) {
    const F16 weight = exp2_16(sub(found, set1(top)), scale * kLog2E);
    sum = add(sum, weight);
    const __m512 product = scaled_weights(weight, scales, at).v;
    keep(at, reinterpret_cast<__m256i>(_mm512_maskz_cvtneps_pbh(lanes, product)));
  };
  for (int64_t i = 0; i < whole; i += 16) weigh(true_scores(scores, scales, i), i, 0xFFFF);
  if (rest != 0) weigh(last(), whole, rest);
  return {top * scale, reduce_add(sum)};
}
