// Parts of a layer: operators in a row over scratch memory of the context.
#include "layer.h"

#include <algorithm>

namespace xds {
namespace {

// The normed input of the attention; `sum` gets the residual stream.
void enter(Context& ctx, const LayerFrame& frame, const float* residual, const float* ffn_output,
           int64_t tokens, int64_t width, float* sum, float* normed) {
  if (ffn_output != nullptr) {
    add_rms_norm(ctx, residual, ffn_output, frame.input_norm, tokens, width, frame.eps, sum,
                 normed);
    return;
  }
  std::copy_n(residual, tokens * width, sum);
  rms_norm(ctx, residual, frame.input_norm, tokens, width, frame.eps, normed);
}

// Adds what the attention made to the residual stream; hidden states and experts for the FFN.
void leave(Context& ctx, const LayerFrame& frame, const float* attended, int64_t tokens,
           int64_t width, float* logits, const LayerOutput& out) {
  add_rms_norm(ctx, out.residual, attended, frame.ffn_norm, tokens, width, frame.eps, out.residual,
               out.hidden);
  if (!frame.has_router()) return;
  linear(ctx, out.hidden, tokens, frame.router.weight, nullptr, logits);
  gate_topk(ctx, logits, tokens, frame.router.gate, frame.router.bias, out.topk_ids,
            out.topk_weights);
}

// Slots by expert, within an expert in order of token, then slot.
struct Permutation {
  int32_t* counts;         // [experts]
  int32_t* token_of_row;   // [rows]
  int32_t* row_of_slot;    // [tokens * top_k], -1 = skipped
  int64_t rows;
};

Permutation permute(Context& ctx, const int32_t* ids, int64_t tokens, int64_t top_k,
                    int64_t experts) {
  const int64_t slots = tokens * top_k;
  int32_t* counts = ctx.permutation.get<int32_t>(2 * experts + 2 * slots);
  int32_t* next = counts + experts;
  Permutation p{counts, next + experts, next + experts + slots, 0};
  std::fill_n(counts, experts, 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (ids[slot] >= 0) ++counts[ids[slot]];
  }
  for (int64_t e = 0; e < experts; ++e) {
    next[e] = static_cast<int32_t>(p.rows);
    p.rows += counts[e];
  }
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t row = ids[slot] < 0 ? -1 : next[ids[slot]]++;
    p.row_of_slot[slot] = row;
    if (row >= 0) p.token_of_row[row] = static_cast<int32_t>(slot / top_k);
  }
  return p;
}

// Rows of x sorted by expert, and room for as many outputs.
struct Sorted {
  Permutation by;
  float* rows;
  float* outputs;
};

Sorted sort_by_expert(Context& ctx, const float* x, int64_t tokens, const int32_t* ids,
                      int64_t top_k, const Weight& gate_up, int64_t output_width) {
  const Timed timed(ctx.times, Op::kPermute);
  const int64_t width = gate_up.k;
  const Permutation by = permute(ctx, ids, tokens, top_k, gate_up.groups);
  float* rows = ctx.layer.get<float>(by.rows * (width + output_width));
  for (int64_t row = 0; row < by.rows; ++row) {
    std::copy_n(x + by.token_of_row[row] * width, width, rows + row * width);
  }
  return {by, rows, rows + by.rows * width};
}

}  // namespace

void gqa_layer(Context& ctx, const GqaLayer& layer, const float* residual, const float* ffn_output,
               const Batch& batch, const Cache& kv, const LayerOutput& out) {
  const int64_t tokens = batch.tokens, width = layer.output.n;
  const int64_t inner = layer.num_heads * kv.dim;
  const int64_t experts = layer.frame.has_router() ? layer.frame.router.weight.n : 0;
  float* normed = ctx.layer.get<float>(tokens * (width + layer.qkv.n + 2 * inner + experts));
  float* qkv = normed + tokens * width;
  float* q = qkv + tokens * layer.qkv.n;
  float* attended = q + tokens * inner;
  float* logits = attended + tokens * inner;
  enter(ctx, layer.frame, residual, ffn_output, tokens, width, out.residual, normed);
  linear(ctx, normed, tokens, layer.qkv, layer.qkv_bias, qkv);
  rope_kv_write(ctx, qkv, layer.rope, batch, kv, layer.num_heads, layer.norm, q);
  paged_attention(ctx, q, batch, kv, layer.num_heads, layer.scale, attended);
  linear(ctx, attended, tokens, layer.output, layer.output_bias, normed);
  leave(ctx, layer.frame, normed, tokens, width, logits, out);
}

void routed_experts(Context& ctx, const float* x, int64_t tokens, const int32_t* ids,
                    const float* weights, int64_t top_k, const Weight& gate_up, const Weight& down,
                    float* out) {
  const Sorted sorted = sort_by_expert(ctx, x, tokens, ids, top_k, gate_up, down.n);
  expert_mlp(ctx, sorted.rows, sorted.by.counts, gate_up, down, sorted.outputs);
  combine_topk(ctx, sorted.outputs, down.n, sorted.by.row_of_slot, weights, tokens, top_k, out);
}

}  // namespace xds
