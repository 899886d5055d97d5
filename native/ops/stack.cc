// The layer loop: attention side, FFN, experts, over scratch memory of the context.
#include "stack.h"

#include <algorithm>

namespace xds {
namespace {

// What one layer hands to the next, and its parts on the way.
struct Flow {
  LayerOutput attention;
  float* ffn;     // [T, H] output of FFN and experts
  float* shared;  // [T, H] of the FFN where there are experts, too
};

Flow make_flow(Context& ctx, std::span<const DecoderLayer> layers, int64_t tokens, float* out) {
  int64_t top_k = 0;
  for (const DecoderLayer& layer : layers) {
    const LayerFrame& frame = frame_of(layer.attention);
    if (frame.has_router()) top_k = std::max(top_k, frame.router.gate.top_k);
  }
  const int64_t rows = tokens * width_of(layers[0].attention), slots = tokens * top_k;
  float* memory = ctx.stack.get<float>(3 * rows + 2 * slots);
  float* weights = memory + 3 * rows;
  auto* ids = reinterpret_cast<int32_t*>(weights + slots);
  return {{out, memory, ids, weights}, memory + rows, memory + 2 * rows};
}

// flow.ffn = shared + routed, of those that the layer has.
void feed_forward(Context& ctx, const DecoderLayer& layer, int64_t tokens, const Flow& flow) {
  const LayerOutput& in = flow.attention;
  float* shared = layer.experts.exists() ? flow.shared : flow.ffn;
  if (layer.ffn.exists()) {
    const auto count = static_cast<int32_t>(tokens);
    expert_mlp(ctx, in.hidden, &count, layer.ffn.gate_up, layer.ffn.down, shared);
  }
  if (!layer.experts.exists()) return;
  routed_experts(ctx, in.hidden, tokens, in.topk_ids, in.topk_weights,
                 frame_of(layer.attention).router.gate.top_k, layer.experts.gate_up,
                 layer.experts.down, flow.ffn);
  if (layer.ffn.exists()) {
    add_rows(ctx, shared, flow.ffn, tokens, layer.experts.down.n, flow.ffn);
  }
}

}  // namespace

void decoder_layers(Context& ctx, std::span<const DecoderLayer> layers,
                    std::span<const Cache> caches, const Batch& batch, const float* hidden,
                    float* out) {
  const Flow flow = make_flow(ctx, layers, batch.tokens, out);
  const float* ffn_output = nullptr;
  for (size_t i = 0; i < layers.size(); ++i) {
    attention_layer(ctx, layers[i].attention, i == 0 ? hidden : out, ffn_output, batch, caches[i],
                    flow.attention);
    feed_forward(ctx, layers[i], batch.tokens, flow);
    ffn_output = flow.ffn;
  }
  add_rows(ctx, out, flow.ffn, batch.tokens, width_of(layers[0].attention), out);
}

}  // namespace xds
