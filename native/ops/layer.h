// Whole parts of a layer as one operator: no Python, no argument checks between their steps.
#pragma once

#include <variant>

#include "ops.h"

namespace xds {

struct Router {
  Weight weight;      // groups = 0: a dense layer
  Gate gate;
  const float* bias;  // of the choice, or null
};

// What surrounds a layer's attention: the norms before it and before the FFN, and the router.
struct LayerFrame {
  const float* input_norm;
  const float* ffn_norm;
  float eps;
  Router router;

  bool has_router() const { return router.weight.groups > 0; }
};

struct GqaLayer {
  LayerFrame frame;
  Weight qkv;
  const float* qkv_bias;  // or null
  Weight output;
  const float* output_bias;  // or null
  HeadNorm norm;
  Rope rope;
  int64_t num_heads;
  float scale;
};

// Latent attention in absorbed form.
struct MlaLayer {
  LayerFrame frame;
  Weight latents;             // queries (low-rank, if there is `query`), latent, rotary key
  const float* latents_bias;  // or null
  Weight query;               // groups = 0: `latents` gives the heads already
  const float* query_norm;    // of what enters `query`
  const float* latent_norm;
  float norm_eps;       // of these two norms
  Weight key_absorb;    // [heads, rank, size of a head that is not rotated]
  Weight value_absorb;  // [heads, size of a value, rank]
  Weight output;
  const float* output_bias;  // or null
  Rope rope;                 // rotates all of the rotary key
  float scale;

  int64_t num_heads() const { return key_absorb.groups; }
  int64_t rank() const { return key_absorb.n; }
  int64_t plain_dim() const { return key_absorb.k; }
  int64_t rope_dim() const { return 2 * rope.half; }
  int64_t head_dim() const { return plain_dim() + rope_dim(); }
  int64_t query_width() const { return latents.n - rank() - rope_dim(); }
  bool has_query() const { return query.groups > 0; }
};

using AttentionLayer = std::variant<GqaLayer, MlaLayer>;

inline const LayerFrame& frame_of(const AttentionLayer& layer) {
  return std::visit([](const auto& kind) -> const LayerFrame& { return kind.frame; }, layer);
}

// Width of the residual stream.
inline int64_t width_of(const AttentionLayer& layer) {
  return std::visit([](const auto& kind) { return kind.output.n; }, layer);
}

// [T, H] residual stream and normed hidden states; experts only where there is a router.
struct LayerOutput {
  float* residual;
  float* hidden;
  int32_t* topk_ids;
  float* topk_weights;
};

// Attention side of a layer. `ffn_output` [T, H] of the layer before is added to `residual` first;
// null for the first layer. out.residual may be `residual` itself.
void attention_layer(Context& ctx, const AttentionLayer& layer, const float* residual,
                     const float* ffn_output, const Batch& batch, const Cache& kv,
                     const LayerOutput& out);

// The routed experts of `tokens` rows of x: sort by expert, compute, add up in order of slot.
// An id of -1 skips its slot.
void routed_experts(Context& ctx, const float* x, int64_t tokens, const int32_t* ids,
                    const float* weights, int64_t top_k, const Weight& gate_up, const Weight& down,
                    float* out);

}  // namespace xds
