// The next token and log probabilities.
//
// Sorting a vocabulary costs far more than the answer needs. The candidates are instead taken from
// a window below the largest logit that is widened until it decides the result.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace xds {
namespace {

// Window widths in units of the temperature: down to e^-4 of the best probability, and so on.
constexpr float kWindows[] = {4.0f, 8.0f, 10.0f, 12.0f, 16.0f, 24.0f, INFINITY};

int32_t argmax(const Kernels& kernels, const float* logits, int64_t n) {
  const float largest = kernels.max_row(logits, n);
  const float* found = std::find(logits, logits + n, largest);
  return found == logits + n ? 0 : static_cast<int32_t>(found - logits);
}

// Eight running sums, so that the order of addition is fixed but not serial.
double sum_in_double(const float* values, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(values[i + j]);
  }
  for (; i < n; ++i) sums[0] += static_cast<double>(values[i]);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

struct Row {
  const float* logits;
  const float* mass;  // exp((logit - largest) / temperature)
  int64_t n;
  double total;       // of mass
  float largest;
  float temperature;
};

struct Filters {
  int64_t top_k;  // 0 = off
  double top_p;
  double min_p;
  double uniform;
};

// Append the candidates with low <= logit < high to the `held` ones, best first; returns how many
// there are then. NaN has no place in an order and is never a candidate. May write one entry too
// many.
int64_t collect(const Row& row, float low, float high, int32_t* out, int64_t held) {
  int64_t count = held;
  for (int64_t i = 0; i < row.n; ++i) {
    out[count] = static_cast<int32_t>(i);
    count += (row.logits[i] >= low) & (row.logits[i] < high);
  }
  std::sort(out + held, out + count, [&](int32_t a, int32_t b) {
    const float x = row.logits[a], y = row.logits[b];
    return x > y || (x == y && a < b);
  });
  return count;
}

// The candidates that remain after a filter.
struct Kept {
  int64_t count;   // a prefix of the sorted candidates
  double total;    // mass of all that may be sampled
  bool is_final;   // the prefix holds all that may be sampled
  bool is_decided; // false: more candidates are needed to tell
};

double prefix_mass(const Row& row, const int32_t* sorted, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(row.mass[sorted[i]]);
  return sum;
}

Kept apply_top_k(const Row& row, int64_t top_k, const int32_t* sorted, int64_t count, bool is_all) {
  if (top_k <= 0) return {count, row.total, is_all, true};
  const int64_t kept = std::min(count, top_k);
  return {kept, prefix_mass(row, sorted, kept), true, is_all || count >= top_k};
}

// The shortest prefix with at least top_p of the mass; one candidate at least.
Kept apply_top_p(const Row& row, double top_p, const int32_t* sorted, Kept kept) {
  if (top_p >= 1.0) return kept;
  const double wanted = top_p * kept.total;
  double sum = 0.0;
  int64_t i = 0;
  while (i < kept.count && sum < wanted) sum += static_cast<double>(row.mass[sorted[i++]]);
  i = std::max<int64_t>(1, i);
  return {i, prefix_mass(row, sorted, i), true, kept.is_final || sum >= wanted};
}

Kept apply_min_p(const Row& row, double min_p, const int32_t* sorted, Kept kept) {
  if (min_p <= 0.0) return kept;
  const double bound = min_p * static_cast<double>(row.mass[sorted[0]]);
  int64_t i = 1;
  while (i < kept.count && static_cast<double>(row.mass[sorted[i]]) >= bound) ++i;
  return {i, prefix_mass(row, sorted, i), true, kept.is_final || i < kept.count};
}

// The sampled token, or -1 when `count` sorted candidates do not decide it; all of them always do.
int32_t decide(const Row& row, const Filters& f, const int32_t* sorted, int64_t count,
               bool is_all) {
  Kept kept = apply_top_k(row, f.top_k, sorted, count, is_all);
  if (kept.is_decided) kept = apply_top_p(row, f.top_p, sorted, kept);
  if (kept.is_decided) kept = apply_min_p(row, f.min_p, sorted, kept);
  if (!kept.is_decided && !is_all) return -1;
  const double target = f.uniform * kept.total;
  double sum = 0.0;
  for (int64_t i = 0; i < kept.count; ++i) {
    sum += static_cast<double>(row.mass[sorted[i]]);
    if (sum > target) return sorted[i];
  }
  return kept.is_final ? sorted[kept.count - 1] : -1;
}

int32_t sample_row(const Kernels& kernels, const float* logits, int64_t n, float temperature,
                   const Filters& filters, float* mass, int32_t* candidates) {
  const float largest = kernels.max_row(logits, n);
  if (temperature == 0.0f || !std::isfinite(largest)) return argmax(kernels, logits, n);
  kernels.exp_row(logits, n, largest, temperature, mass);
  const Row row{logits, mass, n, sum_in_double(mass, n), largest, temperature};
  int64_t count = 0;
  float high = INFINITY;
  for (const float window : kWindows) {
    const float low = largest - window * temperature;
    count = collect(row, low, high, candidates, count);
    high = low;
    const int32_t token = decide(row, filters, candidates, count, window == INFINITY);
    if (token >= 0) return token;
  }
  return candidates[0];
}

// The `count` best ids, best first, ties by lower id: insertion into a short sorted list.
void best_ids(const float* logits, int64_t n, int64_t count, int32_t* out) {
  int64_t held = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (held == count && !(logits[i] > logits[out[held - 1]])) continue;
    int64_t at = held < count ? held++ : held - 1;
    for (; at > 0 && logits[i] > logits[out[at - 1]]; --at) out[at] = out[at - 1];
    out[at] = static_cast<int32_t>(i);
  }
}

}  // namespace

void sample(Context& ctx, const float* logits, int64_t rows, int64_t vocab, const Sampling& params,
            int32_t* out) {
  const Timed timed(ctx.times, Op::kSample);
  for (Scratch& scratch : ctx.thread_scratch) scratch.get<float>(2 * vocab + 1);
  ctx.pool.for_each(rows, [&](int64_t b, int thread) {
    float* mass = ctx.thread_scratch[static_cast<size_t>(thread)].get<float>(2 * vocab + 1);
    const Filters filters{params.top_k[b], params.top_p[b], params.min_p[b], params.uniform[b]};
    out[b] = sample_row(ctx.kernels, logits + b * vocab, vocab, params.temperature[b], filters,
                        mass, reinterpret_cast<int32_t*>(mass + vocab));
  });
}

void top_logprobs(Context& ctx, const float* logits, int64_t rows, int64_t vocab,
                  const int32_t* ids, int64_t num_top, float* chosen, int32_t* top_ids,
                  float* top_values) {
  const Timed timed(ctx.times, Op::kLogprobs);
  for (Scratch& scratch : ctx.thread_scratch) scratch.get<float>(vocab);
  ctx.pool.for_each(rows, [&](int64_t b, int thread) {
    float* mass = ctx.thread_scratch[static_cast<size_t>(thread)].get<float>(vocab);
    const float* row = logits + b * vocab;
    const float largest = ctx.kernels.max_row(row, vocab);
    ctx.kernels.exp_row(row, vocab, largest, 1.0f, mass);
    const double log_sum = static_cast<double>(largest) + std::log(sum_in_double(mass, vocab));
    auto log_prob = [&](int32_t id) { return static_cast<float>(row[id] - log_sum); };
    chosen[b] = log_prob(ids[b]);
    if (num_top > 0) best_ids(row, vocab, num_top, top_ids + b * num_top);
    for (int64_t i = b * num_top; i < (b + 1) * num_top; ++i) top_values[i] = log_prob(top_ids[i]);
  });
}

}  // namespace xds
