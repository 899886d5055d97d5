// Whole parts of a layer as one operator: no Python, no argument checks between their steps.
#pragma once

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

// [T, H] residual stream and normed hidden states; experts only where there is a router.
struct LayerOutput {
  float* residual;
  float* hidden;
  int32_t* topk_ids;
  float* topk_weights;
};

// Attention side of a layer. `ffn_output` [T, H] of the layer before is added to `residual` first;
// null for the first layer.
void gqa_layer(Context& ctx, const GqaLayer& layer, const float* residual, const float* ffn_output,
               const Batch& batch, const Cache& kv, const LayerOutput& out);

// The routed experts of `tokens` rows of x: sort by expert, compute, add up in order of slot.
// An id of -1 skips its slot.
void routed_experts(Context& ctx, const float* x, int64_t tokens, const int32_t* ids,
                    const float* weights, int64_t top_k, const Weight& gate_up, const Weight& down,
                    float* out);

}  // namespace xds
