// Bindings of a layer's parts. A layer is checked once, when its view is made.
#include "../ops/layer.h"

#include "views.h"

namespace xds {

using namespace nb::literals;

namespace {

struct GqaLayerView {
  std::vector<Floats1> vectors;  // keeps norms and biases alive
  std::vector<WeightView> weights;
  Floats2 rope;
  GqaLayer layer{};
};

const float* keep(GqaLayerView& view, std::optional<Floats1> vector, int64_t length,
                  const char* what) {
  if (!vector) return nullptr;
  check_equal(size(*vector, 0), length, what);
  view.vectors.push_back(*vector);
  return view.vectors.back().data();
}

const Weight& keep(GqaLayerView& view, const WeightView& weight) {
  check_equal(weight.weight.groups, 1, "number of weight groups");
  view.weights.push_back(weight);
  return weight.weight;
}

using GateNumbers = std::tuple<int64_t, bool, bool, int64_t, int64_t, float>;

Router view_router(GqaLayerView& view, const WeightView& weight, std::optional<Floats1> bias,
                   const GateNumbers& numbers) {
  const auto& [top_k, sigmoid, renormalize, num_groups, topk_groups, scaling] = numbers;
  Router router{};
  router.weight = keep(view, weight);
  router.gate = {router.weight.n, top_k, sigmoid, renormalize, num_groups, topk_groups, scaling};
  check_gate(router.gate);
  router.bias = keep(view, std::move(bias), router.weight.n, "length of the router's bias");
  return router;
}

void init_gqa_layer(GqaLayerView* self, Floats1 input_norm, Floats1 ffn_norm, float eps,
                    const WeightView& qkv, std::optional<Floats1> qkv_bias,
                    const WeightView& output, std::optional<Floats1> output_bias,
                    std::optional<Floats1> q_norm, std::optional<Floats1> k_norm, float norm_eps,
                    Floats2 rope, int64_t num_heads, float scale) {
  GqaLayerView view{{}, {}, rope};
  GqaLayer& layer = view.layer;
  layer.qkv = keep(view, qkv);
  layer.output = keep(view, output);
  check_equal(layer.output.n, layer.qkv.k, "output features of the output projection");
  check(num_heads >= 1 && layer.output.k % num_heads == 0,
        "the heads must divide the output projection's input");
  const int64_t width = layer.qkv.k, dim = layer.output.k / num_heads;
  check(layer.qkv.n > num_heads * dim && (layer.qkv.n / dim - num_heads) % 2 == 0 &&
            layer.qkv.n % dim == 0,
        "qkv must have rows for all query heads and as many keys as values");
  check_rope(rope, dim);
  layer.frame.input_norm = keep(view, input_norm, width, "length of the input norm");
  layer.frame.ffn_norm = keep(view, ffn_norm, width, "length of the FFN norm");
  layer.frame.eps = eps;
  layer.qkv_bias = keep(view, std::move(qkv_bias), layer.qkv.n, "length of the qkv bias");
  layer.output_bias = keep(view, std::move(output_bias), width, "length of the output bias");
  layer.norm = {keep(view, std::move(q_norm), dim, "length of the q norm"),
                keep(view, std::move(k_norm), dim, "length of the k norm"), norm_eps};
  layer.rope = {rope.data(), size(rope, 1) / 2};
  layer.num_heads = num_heads;
  layer.scale = scale;
  new (self) GqaLayerView(std::move(view));
}

void set_router(GqaLayerView& self, const WeightView& weight, std::optional<Floats1> bias,
                const GateNumbers& gate) {
  self.layer.frame.router = view_router(self, weight, std::move(bias), gate);
  check_equal(self.layer.frame.router.weight.k, self.layer.qkv.k, "inputs of the router");
}

void check_step(const GqaLayerView& layer, const BatchView& batch, const CacheView& kv) {
  const Cache& cache = kv.cache;
  check_kind(cache, false);
  check_fits(batch, cache);
  check_fits(batch, layer.rope, cache.dim);
  check_equal(layer.layer.output.k / layer.layer.num_heads, cache.dim, "head size");
  check_equal(layer.layer.qkv.n, (layer.layer.num_heads + 2 * cache.heads) * cache.dim,
              "output features of qkv");
  check(layer.layer.num_heads % cache.heads == 0,
        "query heads must be a multiple of the kv heads");
}

void py_gqa_layer(Context& ctx, const GqaLayerView& layer, Floats2 residual,
                  std::optional<Floats2> ffn_output, const BatchView& batch, const CacheView& kv,
                  Array<float, 2> sum, Array<float, 2> hidden,
                  std::optional<Array<int32_t, 2>> ids, std::optional<Array<float, 2>> weights) {
  check_step(layer, batch, kv);
  const LayerFrame& frame = layer.layer.frame;
  const int64_t tokens = batch.batch.tokens, width = layer.layer.qkv.k;
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
  gqa_layer(ctx, layer.layer, residual.data(), ffn_output ? ffn_output->data() : nullptr,
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

void bind_layer(nb::module_& m, nb::class_<Context>& cls) {
  nb::class_<GqaLayerView>(m, "GqaLayer")
      .def("__init__", &init_gqa_layer, "input_norm"_a.noconvert(), "ffn_norm"_a.noconvert(),
           "eps"_a, "qkv"_a, "qkv_bias"_a.noconvert().none(), "output"_a,
           "output_bias"_a.noconvert().none(), "q_norm"_a.noconvert().none(),
           "k_norm"_a.noconvert().none(), "norm_eps"_a, "rope"_a.noconvert(), "num_heads"_a,
           "scale"_a)
      .def("set_router", &set_router, "weight"_a, "bias"_a.noconvert().none(), "gate"_a);
  cls.def("gqa_layer", &py_gqa_layer, "layer"_a, "residual"_a.noconvert(),
          "ffn_output"_a.noconvert().none(), "batch"_a, "kv"_a, "sum"_a.noconvert(),
          "hidden"_a.noconvert(), "ids"_a.noconvert().none(), "weights"_a.noconvert().none())
      .def("routed_experts", &py_routed_experts, "x"_a.noconvert(), "topk_ids"_a.noconvert(),
           "topk_weights"_a.noconvert(), "gate_up"_a, "down"_a, "out"_a.noconvert());
}

}  // namespace xds
