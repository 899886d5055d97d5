// Parts of a layer: operators in a row over scratch memory of the context.
#include "layer.h"

#include <algorithm>

#include "for_rows.h"

namespace xds {
namespace {

// Hands out parts of one piece of memory.
class Parts {
 public:
  explicit Parts(float* memory) : next_(memory) {}

  float* take(int64_t count) {
    float* part = next_;
    next_ += count;
    return part;
  }

 private:
  float* next_;
};

// The normed input of the attention; `sum` gets the residual stream.
void enter(Context& ctx, const LayerFrame& frame, const float* residual, const float* ffn_output,
           int64_t tokens, int64_t width, float* sum, float* normed) {
  if (ffn_output != nullptr) {
    add_rms_norm(ctx, residual, ffn_output, frame.input_norm, tokens, width, frame.eps, sum,
                 normed);
    return;
  }
  if (sum != residual) std::copy_n(residual, tokens * width, sum);
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

// The attention of each kind of layer, on its normed input: floats of scratch memory that it
// needs, and `normed` [T, H] becomes its output.
int64_t attend_floats(const GqaLayer& layer, int64_t tokens) {
  return tokens * (layer.qkv.n + 2 * layer.output.k);
}

void attend(Context& ctx, const GqaLayer& layer, const Batch& batch, const Cache& kv, Parts parts,
            float* normed) {
  const int64_t tokens = batch.tokens;
  float* qkv = parts.take(tokens * layer.qkv.n);
  float* q = parts.take(tokens * layer.output.k);
  float* attended = parts.take(tokens * layer.output.k);
  linear(ctx, normed, tokens, layer.qkv, layer.qkv_bias, qkv);
  rope_kv_write(ctx, qkv, layer.rope, batch, kv, layer.num_heads, layer.norm, q);
  paged_attention(ctx, q, batch, kv, layer.num_heads, layer.scale, attended);
  linear(ctx, attended, tokens, layer.output, layer.output_bias, normed);
}

const float* cos_sin_of(const Rope& rope, const Batch& batch, int64_t token) {
  return rope.table + batch.positions[token] * 2 * rope.half;
}

// What latent attention makes of the first projection. Of `queries` only low-rank ones are written.
struct Latents {
  float* latent;   // [T, rank], normed
  float* key;      // [T, rope_dim], rotated
  float* queries;  // [T, query_width], normed; null: they are the heads already
};

void split_latents(Context& ctx, const MlaLayer& layer, const Batch& batch, const float* projected,
                   const Latents& out) {
  const Timed timed(ctx.times, Op::kMlaSplit);
  const Kernels& kernels = ctx.kernels;
  const int64_t rank = layer.rank(), rope_dim = layer.rope_dim(), queries = layer.query_width();
  for_rows(ctx, batch.tokens, layer.latents.n, [&](int64_t t, int) {
    const float* row = projected + t * layer.latents.n;
    const float* latent = row + queries;
    if (out.queries != nullptr) {
      kernels.rms_norm_row(row, layer.query_norm, queries, layer.norm_eps,
                           out.queries + t * queries);
    }
    kernels.rms_norm_row(latent, layer.latent_norm, rank, layer.norm_eps, out.latent + t * rank);
    kernels.rope_row(latent + rank, cos_sin_of(layer.rope, batch, t), layer.rope.half, rope_dim,
                     out.key + t * rope_dim);
  });
}

// Heads, `stride` floats from token to token: plain part [T, heads, plain_dim] and rotated part
// [T, heads, rope_dim].
void split_heads(Context& ctx, const MlaLayer& layer, const Batch& batch, const float* heads,
                 int64_t stride, float* plain, float* rotated) {
  const Timed timed(ctx.times, Op::kMlaSplit);
  const int64_t count = layer.num_heads(), plain_dim = layer.plain_dim();
  const int64_t rope_dim = layer.rope_dim(), dim = layer.head_dim();
  for_rows(ctx, batch.tokens * count, dim, [&](int64_t row, int) {
    const int64_t t = row / count;
    const float* head = heads + t * stride + row % count * dim;
    std::copy_n(head, plain_dim, plain + row * plain_dim);
    ctx.kernels.rope_row(head + plain_dim, cos_sin_of(layer.rope, batch, t), layer.rope.half,
                         rope_dim, rotated + row * rope_dim);
  });
}

int64_t attend_floats(const MlaLayer& layer, int64_t tokens) {
  const int64_t queries = layer.has_query() ? layer.query_width() + layer.query.n : 0;
  const int64_t per_head = layer.head_dim() + 2 * layer.rank() + layer.value_absorb.n;
  return tokens * (layer.latents.n + layer.rank() + layer.rope_dim() + queries +
                   layer.num_heads() * per_head);
}

void attend(Context& ctx, const MlaLayer& layer, const Batch& batch, const Cache& kv, Parts parts,
            float* normed) {
  const int64_t tokens = batch.tokens, rank = layer.rank(), count = tokens * layer.num_heads();
  float* projected = parts.take(tokens * layer.latents.n);
  const Latents latents{parts.take(tokens * rank), parts.take(tokens * layer.rope_dim()),
                        layer.has_query() ? parts.take(tokens * layer.query_width()) : nullptr};
  float* plain = parts.take(count * layer.plain_dim());
  float* rotated = parts.take(count * layer.rope_dim());
  float* query = parts.take(count * rank);
  float* attended = parts.take(count * rank);
  float* values = parts.take(count * layer.value_absorb.n);
  linear(ctx, normed, tokens, layer.latents, layer.latents_bias, projected);
  split_latents(ctx, layer, batch, projected, latents);
  mla_kv_write(ctx, latents.latent, rank, latents.key, batch, kv);
  const float* heads = projected;
  if (layer.has_query()) {
    float* raised = parts.take(tokens * layer.query.n);
    linear(ctx, latents.queries, tokens, layer.query, nullptr, raised);
    heads = raised;
  }
  const int64_t stride = layer.has_query() ? layer.query.n : layer.latents.n;
  split_heads(ctx, layer, batch, heads, stride, plain, rotated);
  grouped_linear(ctx, plain, tokens, layer.key_absorb, query);
  mla_attention(ctx, query, rank, rotated, batch, kv, layer.num_heads(), layer.scale, attended);
  grouped_linear(ctx, attended, tokens, layer.value_absorb, values);
  linear(ctx, values, tokens, layer.output, layer.output_bias, normed);
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

void attention_layer(Context& ctx, const AttentionLayer& layer, const float* residual,
                     const float* ffn_output, const Batch& batch, const Cache& kv,
                     const LayerOutput& out) {
  const LayerFrame& frame = frame_of(layer);
  const int64_t tokens = batch.tokens, width = width_of(layer);
  const int64_t experts = frame.has_router() ? frame.router.weight.n : 0;
  std::visit(
      [&](const auto& kind) {
        const int64_t inner = attend_floats(kind, tokens);
        Parts parts(ctx.layer.get<float>(tokens * (width + experts) + inner));
        float* normed = parts.take(tokens * width);
        float* logits = parts.take(tokens * experts);
        enter(ctx, frame, residual, ffn_output, tokens, width, out.residual, normed);
        attend(ctx, kind, batch, kv, parts, normed);
        leave(ctx, frame, normed, tokens, width, logits, out);
      },
      layer);
}

void routed_experts(Context& ctx, const float* x, int64_t tokens, const int32_t* ids,
                    const float* weights, int64_t top_k, const Weight& gate_up, const Weight& down,
                    float* out) {
  const Sorted sorted = sort_by_expert(ctx, x, tokens, ids, top_k, gate_up, down.n);
  expert_mlp(ctx, sorted.rows, sorted.by.counts, gate_up, down, sorted.outputs);
  combine_topk(ctx, sorted.outputs, down.n, sorted.by.row_of_slot, weights, tokens, top_k, out);
}

}  // namespace xds
