// Bindings of a layer's parts. A layer is checked once, when its view is made.
#include "../ops/layer.h"

#include "views.h"

namespace xds {

using namespace nb::literals;

const float* Kept::vector(const std::optional<Floats1>& vector, int64_t length, const char* what) {
  if (!vector) return nullptr;
  check_equal(size(*vector, 0), length, what);
  vectors.push_back(*vector);
  return vector->data();
}

const Weight& Kept::weight(const WeightView& weight) {
  weights.push_back(weight);
  return weight.weight;
}

const Weight& Kept::plain(const WeightView& weight) {
  check_equal(weight.weight.groups, 1, "number of weight groups");
  return this->weight(weight);
}

namespace {

void init_frame(FrameView* self, Floats1 input_norm, Floats1 ffn_norm, float eps) {
  FrameView view{{}, size(input_norm, 0)};
  view.frame.input_norm = view.kept.vector(input_norm, view.width, "length of the input norm");
  view.frame.ffn_norm = view.kept.vector(ffn_norm, view.width, "length of the FFN norm");
  view.frame.eps = eps;
  new (self) FrameView(std::move(view));
}

using GateNumbers = std::tuple<int64_t, bool, bool, int64_t, int64_t, float>;

void set_router(FrameView& self, const WeightView& weight, std::optional<Floats1> bias,
                const GateNumbers& numbers) {
  const auto& [top_k, sigmoid, renormalize, num_groups, topk_groups, scaling] = numbers;
  Router router{};
  router.weight = self.kept.plain(weight);
  check_equal(router.weight.k, self.width, "inputs of the router");
  router.gate = {router.weight.n, top_k, sigmoid, renormalize, num_groups, topk_groups, scaling};
  check_gate(router.gate);
  router.bias = self.kept.vector(bias, router.weight.n, "length of the router's bias");
  self.frame.router = router;
}

// The rope table as a layer reads it.
Rope rope_of(const Floats2& rope) { return {rope.data(), size(rope, 1) / 2}; }

LayerView make_gqa(const FrameView& frame, const WeightView& qkv, std::optional<Floats1> qkv_bias,
                   const WeightView& output, std::optional<Floats1> output_bias,
                   std::optional<Floats1> q_norm, std::optional<Floats1> k_norm, float norm_eps,
                   Floats2 rope, int64_t num_heads, float scale) {
  Kept kept;
  GqaLayer layer{};
  layer.frame = frame.frame;
  layer.qkv = kept.plain(qkv);
  layer.output = kept.plain(output);
  check_equal(layer.qkv.k, frame.width, "inputs of qkv");
  check_equal(layer.output.n, frame.width, "output features of the output projection");
  check(num_heads >= 1 && layer.output.k % num_heads == 0,
        "the heads must divide the output projection's input");
  const int64_t dim = layer.output.k / num_heads;
  check(layer.qkv.n > num_heads * dim && (layer.qkv.n / dim - num_heads) % 2 == 0 &&
            layer.qkv.n % dim == 0,
        "qkv must have rows for all query heads and as many keys as values");
  check_rope(rope, dim);
  layer.qkv_bias = kept.vector(qkv_bias, layer.qkv.n, "length of the qkv bias");
  layer.output_bias = kept.vector(output_bias, frame.width, "length of the output bias");
  layer.norm = {kept.vector(q_norm, dim, "length of the q norm"),
                kept.vector(k_norm, dim, "length of the k norm"), norm_eps};
  layer.rope = rope_of(rope);
  layer.num_heads = num_heads;
  check_scale(scale);
  layer.scale = scale;
  return {frame, std::move(kept), std::move(rope), layer};
}

// Sizes of one matrix against the next.
void check_latent_chain(const MlaLayer& layer, int64_t width) {
  check_equal(layer.latents.k, width, "inputs of latents");
  check_equal(layer.output.n, width, "output features of the output projection");
  check(layer.query_width() >= 1, "latents must have rows for queries, latent and rotary key");
  const int64_t heads = layer.num_heads() * layer.head_dim();
  if (layer.has_query()) {
    check_equal(layer.query.k, layer.query_width(), "inputs of the query");
    check_equal(layer.query.n, heads, "output features of the query");
  } else {
    check_equal(layer.query_width(), heads, "query rows of latents");
  }
  check_equal(layer.value_absorb.groups, layer.num_heads(), "heads of value_absorb");
  check_equal(layer.value_absorb.k, layer.rank(), "inputs of value_absorb");
  check_equal(layer.output.k, layer.num_heads() * layer.value_absorb.n,
              "inputs of the output projection");
}

LayerView make_mla(const FrameView& frame, const WeightView& latents,
                   std::optional<Floats1> latents_bias, const WeightView* query,
                   std::optional<Floats1> query_norm, Floats1 latent_norm, float norm_eps,
                   const WeightView& key_absorb, const WeightView& value_absorb,
                   const WeightView& output, std::optional<Floats1> output_bias, Floats2 rope,
                   float scale) {
  check(size(rope, 1) % 2 == 0, "rotary_dim must be even");
  check((query == nullptr) == !query_norm, "a query and its norm go together");
  Kept kept;
  MlaLayer layer{};
  layer.frame = frame.frame;
  layer.rope = rope_of(rope);
  layer.latents = kept.plain(latents);
  if (query != nullptr) layer.query = kept.plain(*query);
  layer.key_absorb = kept.weight(key_absorb);
  layer.value_absorb = kept.weight(value_absorb);
  layer.output = kept.plain(output);
  check_latent_chain(layer, frame.width);
  layer.latents_bias = kept.vector(latents_bias, layer.latents.n, "length of the latents' bias");
  layer.query_norm = kept.vector(query_norm, layer.query_width(), "length of the query norm");
  layer.latent_norm = kept.vector(latent_norm, layer.rank(), "length of the latent norm");
  layer.norm_eps = norm_eps;
  layer.output_bias = kept.vector(output_bias, frame.width, "length of the output bias");
  check_scale(scale);
  layer.scale = scale;
  return {frame, std::move(kept), std::move(rope), layer};
}

void check_cache(const GqaLayer& layer, const Cache& cache) {
  check_kind(cache, false);
  check_equal(layer.output.k / layer.num_heads, cache.dim, "head size");
  check_equal(layer.qkv.n, (layer.num_heads + 2 * cache.heads) * cache.dim,
              "output features of qkv");
  check(layer.num_heads % cache.heads == 0, "query heads must be a multiple of the kv heads");
}

void check_cache(const MlaLayer& layer, const Cache& cache) {
  check_kind(cache, true);
  check_equal(layer.rank() + layer.rope_dim(), cache.dim, "latent plus rope size");
}

void py_attention_layer(Context& ctx, const LayerView& layer, Floats2 residual,
                        std::optional<Floats2> ffn_output, const BatchView& batch,
                        const CacheView& kv, Array<float, 2> sum, Array<float, 2> hidden,
                        std::optional<Array<int32_t, 2>> ids,
                        std::optional<Array<float, 2>> weights) {
  check_step(layer, batch, kv);
  const LayerFrame& frame = layer.frame.frame;
  const int64_t tokens = batch.batch.tokens, width = layer.frame.width;
  check(size(residual, 0) == tokens && size(residual, 1) == width, "residual must be [T, H]");
  if (ffn_output) {
    check(size(*ffn_output, 0) == tokens && size(*ffn_output, 1) == width,
          "ffn_output must be [T, H]");
  }
  check_rows(sum, tokens, width, "sum");
  check_rows(hidden, tokens, width, "hidden");
  LayerOutput out{sum.data(), hidden.data(), nullptr, nullptr};
  if (frame.has_router()) {
    check(ids && weights && size(*ids, 0) == tokens && size(*ids, 1) == frame.router.gate.top_k,
          "ids must be [T, K]");
    check_rows(*weights, tokens, frame.router.gate.top_k, "weights");
    out.topk_ids = ids->data();
    out.topk_weights = weights->data();
  }
  Turn turn(ctx);
  attention_layer(ctx, layer.layer, residual.data(), ffn_output ? ffn_output->data() : nullptr,
                  batch.batch, kv.cache, out);
}

void py_routed_experts(Context& ctx, Floats2 x, Ints2 ids, Floats2 weights,
                       const WeightView& gate_up, const WeightView& down, Array<float, 2> out) {
  const int64_t tokens = size(x, 0), top_k = size(ids, 1);
  check_equal(down.weight.groups, gate_up.weight.groups, "number of experts in down");
  check_equal(size(x, 1), gate_up.weight.k, "row length of x");
  check_equal(gate_up.weight.n, 2 * down.weight.k, "output features of gate_up");
  check(size(ids, 0) == tokens && size(weights, 0) == tokens && size(weights, 1) == top_k,
        "topk_ids and topk_weights must be [T, K]");
  check_rows(out, tokens, down.weight.n, "out");
  check_range(ids.data(), tokens * top_k, -1, gate_up.weight.groups, "topk_ids");
  Turn turn(ctx);
  routed_experts(ctx, x.data(), tokens, ids.data(), weights.data(), top_k, gate_up.weight,
                 down.weight, out.data());
}

}  // namespace

void check_step(const LayerView& layer, const BatchView& batch, const CacheView& kv) {
  check_fits(batch, kv.cache);
  check_fits(batch, layer.rope, kv.cache.dim);
  std::visit([&](const auto& kind) { check_cache(kind, kv.cache); }, layer.layer);
}

void bind_layer(nb::module_& m, nb::class_<Context>& cls) {
  nb::class_<FrameView>(m, "Frame")
      .def("__init__", &init_frame, "input_norm"_a.noconvert(), "ffn_norm"_a.noconvert(), "eps"_a)
      .def("set_router", &set_router, "weight"_a, "bias"_a.noconvert().none(), "gate"_a);
  nb::class_<LayerView>(m, "Layer");
  m.def("gqa_layer", &make_gqa, "frame"_a, "qkv"_a, "qkv_bias"_a.noconvert().none(), "output"_a,
        "output_bias"_a.noconvert().none(), "q_norm"_a.noconvert().none(),
        "k_norm"_a.noconvert().none(), "norm_eps"_a, "rope"_a.noconvert(), "num_heads"_a,
        "scale"_a);
  m.def("mla_layer", &make_mla, "frame"_a, "latents"_a, "latents_bias"_a.noconvert().none(),
        "query"_a.none(), "query_norm"_a.noconvert().none(), "latent_norm"_a.noconvert(),
        "norm_eps"_a, "key_absorb"_a, "value_absorb"_a, "output"_a,
        "output_bias"_a.noconvert().none(), "rope"_a.noconvert(), "scale"_a);
  cls.def("attention_layer", &py_attention_layer, "layer"_a, "residual"_a.noconvert(),
          "ffn_output"_a.noconvert().none(), "batch"_a, "kv"_a, "sum"_a.noconvert(),
          "hidden"_a.noconvert(), "ids"_a.noconvert().none(), "weights"_a.noconvert().none())
      .def("routed_experts", &py_routed_experts, "x"_a.noconvert(), "topk_ids"_a.noconvert(),
           "topk_weights"_a.noconvert(), "gate_up"_a, "down"_a, "out"_a.noconvert());
}

}  // namespace xds
