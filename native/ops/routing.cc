// Experts of a token: scores, choice, and the weighted sum of what the experts return.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace xds {
namespace {

// Index of the largest value, the lowest one on ties; -1 when there is none above -inf.
int64_t largest(const float* values, int64_t n) {
  int64_t best = -1;
  float bound = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    if (!(values[i] > bound)) continue;
    bound = values[i];
    best = i;
  }
  return best;
}

// The lowest expert not chosen yet: the last resort when broken scores leave no candidate.
int64_t lowest_unchosen(const int32_t* ids, int64_t count) {
  int64_t expert = 0;
  while (std::find(ids, ids + count, expert) != ids + count) ++expert;
  return expert;
}

float sum_of_two_best(const float* values, int64_t n) {
  float first = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] > first) {
      second = first;
      first = values[i];
    } else if (values[i] > second) {
      second = values[i];
    }
  }
  return n > 1 ? first + second : first;
}

// Set the choice scores of all but the best groups to -inf.
void keep_best_groups(const Gate& gate, float* choice, float* group_scores) {
  const int64_t size = gate.num_experts / gate.num_groups;
  for (int64_t g = 0; g < gate.num_groups; ++g) {
    group_scores[g] = sum_of_two_best(choice + g * size, size);
  }
  for (int64_t i = 0; i < gate.topk_groups; ++i) {
    const int64_t g = largest(group_scores, gate.num_groups);
    if (g < 0) break;  // only broken scores left
    group_scores[g] = -INFINITY;
    group_scores[gate.num_groups + g] = 1.0f;
  }
  for (int64_t g = 0; g < gate.num_groups; ++g) {
    if (group_scores[gate.num_groups + g] == 0.0f) std::fill_n(choice + g * size, size, -INFINITY);
  }
}

void route(const Kernels& kernels, const float* logits, const Gate& gate, const float* bias,
           float* scratch, int32_t* ids, float* weights) {
  float* scores = scratch;
  float* choice = scores + gate.num_experts;
  float* group_scores = choice + gate.num_experts;  // [num_groups], then marks [num_groups]
  (gate.sigmoid ? kernels.sigmoid_row : kernels.softmax_row)(logits, gate.num_experts, scores);
  std::copy_n(scores, gate.num_experts, choice);
  if (bias != nullptr) kernels.add_row(scores, bias, gate.num_experts, choice);
  if (gate.num_groups > 1) {
    std::fill_n(group_scores, 2 * gate.num_groups, 0.0f);
    keep_best_groups(gate, choice, group_scores);
  }
  float sum = 0.0f;
  for (int64_t k = 0; k < gate.top_k; ++k) {
    const int64_t found = largest(choice, gate.num_experts);
    const int64_t expert = found < 0 ? lowest_unchosen(ids, k) : found;
    choice[expert] = -INFINITY;
    ids[k] = static_cast<int32_t>(expert);
    weights[k] = scores[expert];
    sum += weights[k];
  }
  const float divisor = sum + (gate.sigmoid ? 1e-20f : 0.0f);
  for (int64_t k = 0; k < gate.top_k; ++k) {
    weights[k] = (gate.renormalize ? weights[k] / divisor : weights[k]) * gate.scaling;
  }
}

}  // namespace

void gate_topk(Context& ctx, const float* logits, int64_t tokens, const Gate& gate,
               const float* bias, int32_t* ids, float* weights) {
  const Timed timed(ctx.times, Op::kGate);
  float* scratch = ctx.rows.get<float>(2 * (gate.num_experts + gate.num_groups));
  for (int64_t t = 0; t < tokens; ++t) {
    route(ctx.kernels, logits + t * gate.num_experts, gate, bias, scratch, ids + t * gate.top_k,
          weights + t * gate.top_k);
  }
}

void combine_topk(Context& ctx, const float* rows, int64_t width, const int32_t* row_of_slot,
                  const float* weights, int64_t tokens, int64_t top_k, float* out) {
  const Timed timed(ctx.times, Op::kCombine);
  ctx.pool.for_each_in_shares(tokens, [&](int64_t t, int) {
    float* sum = out + t * width;
    std::fill_n(sum, width, 0.0f);
    for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
      if (row_of_slot[slot] < 0) continue;
      ctx.kernels.axpy_row(weights[slot], rows + row_of_slot[slot] * width, width, sum);
    }
  });
}

}  // namespace xds
