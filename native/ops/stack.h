// All layers of a model whose FFNs and experts are of this process, as one operator.
#pragma once

#include <span>

#include "layer.h"

namespace xds {

// SwiGLU weights; groups = 0: there is none.
struct Mlp {
  Weight gate_up;
  Weight down;

  bool exists() const { return gate_up.groups > 0; }
};

struct DecoderLayer {
  AttentionLayer attention;
  Mlp ffn;      // dense, or all shared experts as one
  Mlp experts;  // routed; needs a router
};

// out [T, H] = hidden [T, H] through all layers, each with its cache. One array may be both.
void decoder_layers(Context& ctx, std::span<const DecoderLayer> layers,
                    std::span<const Cache> caches, const Batch& batch, const float* hidden,
                    float* out);

}  // namespace xds
