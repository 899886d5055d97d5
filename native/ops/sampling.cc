// The next token and log probabilities.
//
// Sorting a vocabulary costs far more than the answer needs. The candidates are instead taken from
// a window below the largest logit that is widened until it decides the result.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "number.h"
#include "ops.h"

namespace xds {
namespace {

// Window widths in units of the temperature: down to e^-4 of the best probability, and so on.
constexpr float kWindows[] = {4.0f, 8.0f, 10.0f, 12.0f, 16.0f, 24.0f, INFINITY};

Best argmax(const Kernels& kernels, const float* logits, int64_t n) {
  Best best = kNoBest;
  kernels.argmax_rows(logits, n, 1, n, 0, &best);
  return best;
}

struct Row {
  const float* logits;
  int64_t n;
  float largest;
  float temperature;
  double total;  // of exp((logit - largest) / temperature); 0 when the filters do not ask for it
};

struct Filters {
  int64_t top_k;  // 0 = off
  double top_p;
  double min_p;
  double uniform;

  bool needs_total() const { return top_k <= 0 && (top_p < 1.0 || min_p <= 0.0); }
};

// Ascending keys are descending logits, ties by lower id.
uint64_t sort_key(float logit, int32_t id) {
  const uint32_t bits = bits_of(logit + 0.0f);  // -0 equals 0
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(id);
}

// Sort keys whose ids ascend: by three digits of the logit, the lowest first. `other` is as long.
void radix_sort(uint64_t* keys, uint64_t* other, int64_t count) {
  constexpr int kDigitBits = 11, kDigits = 3;
  constexpr size_t kBins = size_t{1} << kDigitBits;
  auto digit = [](uint64_t key, int at) { return key >> (32 + at * kDigitBits) & (kBins - 1); };
  std::array<std::array<uint32_t, kBins>, kDigits> starts{};
  for (int64_t i = 0; i < count; ++i) {
    for (int at = 0; at < kDigits; ++at) ++starts[at][digit(keys[i], at)];
  }
  for (auto& bins : starts) {
    uint32_t sum = 0;
    for (uint32_t& bin : bins) sum += std::exchange(bin, sum);
  }
  for (int at = 0; at < kDigits; ++at) {
    for (int64_t i = 0; i < count; ++i) other[starts[at][digit(keys[i], at)]++] = keys[i];
    std::swap(keys, other);
  }
  std::copy_n(keys, count, other);  // three swaps: `other` is where the caller's keys are
}

// The best candidates of a row so far, best first.
class Candidates {
 public:
  static int64_t scratch_words(int64_t vocab) { return 3 * vocab + 1; }

  Candidates(const Kernels& kernels, Scratch& scratch, int64_t vocab) : kernels_(kernels) {
    keys_ = scratch.get<uint64_t>(scratch_words(vocab));
    other_ = keys_ + vocab;
    ids_ = reinterpret_cast<int32_t*>(other_ + vocab);
    mass_ = reinterpret_cast<float*>(ids_ + vocab + 1);
  }

  int64_t count() const { return count_; }
  int32_t id(int64_t i) const { return ids_[i]; }
  double mass(int64_t i) const { return static_cast<double>(mass_[i]); }
  double prefix_mass(int64_t count) const {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += mass(i);
    return sum;
  }

  // Add those with low <= logit < high, which are worse than all held.
  void add(const Row& row, float low, float high) {
    int32_t* ids = ids_ + count_;
    float* mass = mass_ + count_;
    const int64_t added = kernels_.collect_row(row.logits, row.n, low, high, ids);
    for (int64_t i = 0; i < added; ++i) keys_[i] = sort_key(row.logits[ids[i]], ids[i]);
    if (added < kManyKeys) {
      std::sort(keys_, keys_ + added);
    } else {
      radix_sort(keys_, other_, added);
    }
    for (int64_t i = 0; i < added; ++i) {
      ids[i] = static_cast<int32_t>(keys_[i]);
      mass[i] = row.logits[ids[i]];
    }
    kernels_.exp_row(mass, added, row.largest, row.temperature, mass);
    count_ += added;
  }

 private:
  static constexpr int64_t kManyKeys = 256;  // from here on digits are faster than comparisons

  const Kernels& kernels_;
  uint64_t* keys_;
  uint64_t* other_;
  int32_t* ids_;
  float* mass_;
  int64_t count_ = 0;
};

// The candidates that remain after a filter.
struct Kept {
  int64_t count;   // a prefix of the sorted candidates
  double total;    // mass of all that may be sampled
  bool is_final;   // the prefix holds all that may be sampled
  bool is_decided; // false: more candidates are needed to tell
};

Kept apply_top_k(const Row& row, int64_t top_k, const Candidates& best, bool is_all) {
  const int64_t count = best.count();
  if (top_k <= 0) return {count, row.total, is_all, true};
  const int64_t kept = std::min(count, top_k);
  return {kept, best.prefix_mass(kept), true, is_all || count >= top_k};
}

// The shortest prefix with at least top_p of the mass; one candidate at least.
Kept apply_top_p(double top_p, const Candidates& best, Kept kept) {
  if (top_p >= 1.0) return kept;
  const double wanted = top_p * kept.total;
  double sum = 0.0;
  int64_t i = 0;
  while (i < kept.count && sum < wanted) sum += best.mass(i++);
  i = std::max<int64_t>(1, i);
  return {i, best.prefix_mass(i), true, kept.is_final || sum >= wanted};
}

Kept apply_min_p(double min_p, const Candidates& best, Kept kept) {
  if (min_p <= 0.0) return kept;
  const double bound = min_p * best.mass(0);
  int64_t i = 1;
  while (i < kept.count && best.mass(i) >= bound) ++i;
  return {i, best.prefix_mass(i), true, kept.is_final || i < kept.count};
}

// The sampled token, or -1 when the candidates do not decide it; all of them always do.
int32_t decide(const Row& row, const Filters& f, const Candidates& best, bool is_all) {
  Kept kept = apply_top_k(row, f.top_k, best, is_all);
  if (kept.is_decided) kept = apply_top_p(f.top_p, best, kept);
  if (kept.is_decided) kept = apply_min_p(f.min_p, best, kept);
  if (!kept.is_decided && !is_all) return -1;
  const double target = f.uniform * kept.total;
  double sum = 0.0;
  for (int64_t i = 0; i < kept.count; ++i) {
    sum += best.mass(i);
    if (sum > target) return best.id(i);
  }
  return kept.is_final ? best.id(kept.count - 1) : -1;
}

int32_t sample_row(const Kernels& kernels, const float* logits, int64_t n, float temperature,
                   const Filters& filters, Scratch& scratch) {
  const Best top = argmax(kernels, logits, n);
  if (temperature == 0.0f || !std::isfinite(top.value)) return top.id == kNoBest.id ? 0 : top.id;
  Row row{logits, n, top.value, temperature, 0.0};
  if (filters.needs_total()) row.total = kernels.exp_sum_row(logits, n, top.value, temperature);
  Candidates candidates(kernels, scratch, n);
  float high = INFINITY;
  for (const float window : kWindows) {
    const float low = top.value - window * temperature;
    candidates.add(row, low, high);
    high = low;
    const int32_t token = decide(row, filters, candidates, window == INFINITY);
    if (token >= 0) return token;
  }
  return top.id;
}

}  // namespace

void sample(Context& ctx, const float* logits, int64_t rows, int64_t vocab, const Sampling& params,
            int32_t* out) {
  const Timed timed(ctx.times, Op::kSample);
  for (Scratch& scratch : ctx.thread_scratch) {
    scratch.get<uint64_t>(Candidates::scratch_words(vocab));
  }
  ctx.pool.for_each(rows, [&](int64_t b, int thread) {
    const Filters filters{params.top_k[b], params.top_p[b], params.min_p[b], params.uniform[b]};
    out[b] = sample_row(ctx.kernels, logits + b * vocab, vocab, params.temperature[b], filters,
                        ctx.thread_scratch[static_cast<size_t>(thread)]);
  });
}

void top_logprobs(Context& ctx, const float* logits, int64_t rows, int64_t vocab,
                  const int32_t* ids, int64_t num_top, float* chosen, int32_t* top_ids,
                  float* top_values) {
  const Timed timed(ctx.times, Op::kLogprobs);
  ctx.pool.for_each(rows, [&](int64_t b, int) {
    const float* row = logits + b * vocab;
    const float largest = ctx.kernels.max_row(row, vocab);
    const double sum = ctx.kernels.exp_sum_row(row, vocab, largest, 1.0f);
    const double log_sum = static_cast<double>(largest) + std::log(sum);
    auto log_prob = [&](int32_t id) { return static_cast<float>(row[id] - log_sum); };
    chosen[b] = log_prob(ids[b]);
    if (num_top > 0) ctx.kernels.best_row(row, vocab, num_top, top_ids + b * num_top);
    for (int64_t i = b * num_top; i < (b + 1) * num_top; ++i) top_values[i] = log_prob(top_ids[i]);
  });
}

}  // namespace xds
