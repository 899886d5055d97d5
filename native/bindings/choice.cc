// Bindings of routing, sampling and log probabilities.
#include "arrays.h"

namespace xds {

using namespace nb::literals;

void check_gate(const Gate& gate) {
  check(gate.num_experts >= 1, "a gate needs at least one expert");
  check(gate.num_groups >= 1 && gate.num_experts % gate.num_groups == 0,
        "the experts must divide evenly into groups");
  check(gate.topk_groups >= 1 && gate.topk_groups <= gate.num_groups,
        "topk_groups must lie in [1, num_groups]");
  const int64_t eligible =
      gate.num_experts / gate.num_groups * (gate.num_groups > 1 ? gate.topk_groups : 1);
  check(gate.top_k >= 1 && gate.top_k <= eligible,
        "top_k must be at least 1 and at most the number of eligible experts");
}

namespace {

void py_gate_topk(Context& ctx, Floats2 logits, std::optional<Floats1> bias, bool sigmoid,
                  bool renormalize, std::tuple<int64_t, int64_t> groups, float scaling,
                  Array<int32_t, 2> ids, Array<float, 2> weights) {
  const Gate gate{size(logits, 1), size(ids, 1),        sigmoid, renormalize,
                  std::get<0>(groups), std::get<1>(groups), scaling};
  check_gate(gate);
  if (bias) check_equal(size(*bias, 0), gate.num_experts, "bias length");
  check(size(ids, 0) == size(logits, 0) && size(weights, 0) == size(logits, 0) &&
            size(weights, 1) == gate.top_k,
        "ids and weights must be [T, K]");
  Turn turn(ctx);
  gate_topk(ctx, logits.data(), size(logits, 0), gate, bias ? bias->data() : nullptr, ids.data(),
            weights.data());
}

int64_t py_penalize(Context& ctx, Array<float, 1> logits, Ints1 prompt, Ints1 output,
                    std::tuple<float, float, float> penalties, Array<int32_t, 1> ids,
                    Array<float, 1> raw) {
  const int64_t vocab = size(logits, 0), total = size(prompt, 0) + size(output, 0);
  check(size(ids, 0) == total && size(raw, 0) == total,
        "ids and raw need one entry per id of prompt and output");
  check_range(prompt.data(), size(prompt, 0), 0, vocab, "prompt");
  check_range(output.data(), size(output, 0), 0, vocab, "output");
  const Penalties values{std::get<0>(penalties), std::get<1>(penalties), std::get<2>(penalties)};
  Turn turn(ctx);
  return penalize(ctx, logits.data(), vocab, {prompt.data(), size(prompt, 0)},
                  {output.data(), size(output, 0)}, values, ids.data(), raw.data());
}

void py_sample(Context& ctx, Floats2 logits, Floats1 temperature, Ints1 top_k, Floats1 top_p,
               Floats1 min_p, Array<const double, 1> uniform, Array<int32_t, 1> out) {
  const int64_t rows = size(logits, 0);
  check(size(logits, 1) >= 1, "logits need a vocabulary");
  check(size(temperature, 0) == rows && size(top_k, 0) == rows && size(top_p, 0) == rows &&
            size(min_p, 0) == rows && size(uniform, 0) == rows && size(out, 0) == rows,
        "every sampling parameter needs one value per row of logits");
  const Sampling params{temperature.data(), top_k.data(), top_p.data(), min_p.data(),
                        uniform.data()};
  Turn turn(ctx);
  sample(ctx, logits.data(), rows, size(logits, 1), params, out.data());
}

void py_top_logprobs(Context& ctx, Floats2 logits, Ints1 ids, Array<float, 1> chosen,
                     Array<int32_t, 2> top_ids, Array<float, 2> top_values) {
  const int64_t rows = size(logits, 0), vocab = size(logits, 1), num_top = size(top_ids, 1);
  check(num_top <= vocab, "num_top must not exceed the vocabulary");
  check(size(ids, 0) == rows && size(chosen, 0) == rows && size(top_ids, 0) == rows &&
            size(top_values, 0) == rows && size(top_values, 1) == num_top,
        "token_ids and outputs need one row per row of logits");
  check_range(ids.data(), rows, 0, vocab, "token_ids");
  Turn turn(ctx);
  top_logprobs(ctx, logits.data(), rows, vocab, ids.data(), num_top, chosen.data(),
               top_ids.data(), top_values.data());
}

}  // namespace

void bind_choice(nb::class_<Context>& cls) {
  cls.def("gate_topk", &py_gate_topk, "logits"_a.noconvert(), "bias"_a.noconvert().none(),
          "sigmoid"_a, "renormalize"_a, "groups"_a, "scaling"_a, "ids"_a.noconvert(),
          "weights"_a.noconvert())
      .def("penalize", &py_penalize, "logits"_a.noconvert(), "prompt"_a.noconvert(),
           "output"_a.noconvert(), "penalties"_a, "ids"_a.noconvert(), "raw"_a.noconvert())
      .def("sample", &py_sample, "logits"_a.noconvert(), "temperature"_a.noconvert(),
           "top_k"_a.noconvert(), "top_p"_a.noconvert(), "min_p"_a.noconvert(),
           "uniform"_a.noconvert(), "out"_a.noconvert())
      .def("top_logprobs", &py_top_logprobs, "logits"_a.noconvert(), "token_ids"_a.noconvert(),
           "chosen"_a.noconvert(), "top_ids"_a.noconvert(), "top_values"_a.noconvert());
}

}  // namespace xds
