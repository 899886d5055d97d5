// Bindings of the layer loop. Layers are checked against each other once, when the stack is made.
#include "../ops/stack.h"

#include "views.h"

namespace xds {

using namespace nb::literals;

namespace {

struct StackView {
  int64_t width = 0;
  std::vector<LayerView> views;  // of the layers, which they keep alive
  Kept kept;
  std::vector<DecoderLayer> layers;
};

Mlp view_mlp(StackView& stack, const WeightView* gate_up, const WeightView* down, int64_t groups) {
  check((gate_up == nullptr) == (down == nullptr), "gate_up and down go together");
  if (gate_up == nullptr) return {};
  const Mlp mlp{stack.kept.weight(*gate_up), stack.kept.weight(*down)};
  check_equal(mlp.gate_up.groups, groups, "number of experts in gate_up");
  check_equal(mlp.down.groups, groups, "number of experts in down");
  check_equal(mlp.gate_up.k, stack.width, "inputs of gate_up");
  check_equal(mlp.gate_up.n, 2 * mlp.down.k, "output features of gate_up");
  check_equal(mlp.down.n, stack.width, "output features of down");
  return mlp;
}

void add_layer(StackView& self, const LayerView& attention, const WeightView* gate_up,
               const WeightView* down, const WeightView* experts_gate_up,
               const WeightView* experts_down) {
  if (self.layers.empty()) self.width = attention.frame.width;
  check_equal(attention.frame.width, self.width, "width of a layer");
  const LayerFrame& frame = attention.frame.frame;
  check(gate_up != nullptr || experts_gate_up != nullptr, "a layer has a dense FFN or experts");
  check(frame.has_router() == (experts_gate_up != nullptr),
        "a layer has experts just where it has a router");
  DecoderLayer layer{attention.layer, view_mlp(self, gate_up, down, 1),
                     view_mlp(self, experts_gate_up, experts_down, frame.router.weight.n)};
  self.views.push_back(attention);
  self.layers.push_back(layer);
}

void py_decoder_layers(Context& ctx, const StackView& stack, Floats2 hidden,
                       const BatchView& batch, const std::vector<const CacheView*>& caches,
                       Array<float, 2> out) {
  const int64_t tokens = batch.batch.tokens;
  check(!stack.layers.empty(), "a stack has at least one layer");
  check_equal(static_cast<int64_t>(caches.size()), static_cast<int64_t>(stack.layers.size()),
              "number of caches");
  check(size(hidden, 0) == tokens && size(hidden, 1) == stack.width,
        "hidden_states must be [T, H]");
  check_rows(out, tokens, stack.width, "out");
  std::vector<Cache> views;
  views.reserve(caches.size());
  for (size_t i = 0; i < caches.size(); ++i) {
    check_step(stack.views[i], batch, *caches[i]);
    views.push_back(caches[i]->cache);
  }
  Turn turn(ctx);
  decoder_layers(ctx, stack.layers, views, batch.batch, hidden.data(), out.data());
}

}  // namespace

void bind_stack(nb::module_& m, nb::class_<Context>& cls) {
  nb::class_<StackView>(m, "Stack")
      .def(nb::init<>())
      .def("add_layer", &add_layer, "attention"_a, "gate_up"_a.none(), "down"_a.none(),
           "experts_gate_up"_a.none(), "experts_down"_a.none());
  cls.def("decoder_layers", &py_decoder_layers, "stack"_a, "hidden_states"_a.noconvert(),
          "batch"_a, "caches"_a, "out"_a.noconvert());
}

}  // namespace xds
