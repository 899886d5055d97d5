// Bindings of the dense and expert operators: checks, then one call.
#include "arrays.h"

namespace xds {

using namespace nb::literals;

Weight weight_shape(int dtype, int64_t groups, int64_t n, int64_t k) {
  check(dtype >= 0 && dtype < kDTypes,
        "weight dtype must be 0 (float32), 1 (bf16), 2 (int8), 3 (int4), 4 (w8a16) or 5 (w8a8g64)");
  check(groups >= 1 && n >= 1 && k >= 1, "a weight needs at least one group, output and input");
  check(k <= kMaxInner, "a weight may have at most 131072 inner features (int32 sums)");
  check(groups <= (1 << 20) && n <= (int64_t{1} << 31), "the weight shape is out of range");
  return {static_cast<DType>(dtype), groups, n, k, nullptr};
}

Weight view_weight(const Bytes& data, int dtype, int64_t groups, int64_t n, int64_t k) {
  Weight weight = weight_shape(dtype, groups, n, k);
  check_equal(size(data, 0), weight.groups * weight.group_bytes(), "packed weight size");
  check(reinterpret_cast<uintptr_t>(data.data()) % 4 == 0, "packed weights must be aligned");
  weight.data = data.data();
  return weight;
}

namespace {

using WeightShape = std::tuple<int, int64_t, int64_t, int64_t>;  // dtype, G, N, K

Weight weight_of(const Bytes& data, const WeightShape& s) {
  return view_weight(data, std::get<0>(s), std::get<1>(s), std::get<2>(s), std::get<3>(s));
}

void py_pack(Context& ctx, Floats3 values, int dtype, MutableBytes out) {
  const Weight shape = weight_shape(dtype, size(values, 0), size(values, 1), size(values, 2));
  check_equal(size(out, 0), shape.groups * shape.group_bytes(), "packed weight size");
  Turn turn(ctx);
  pack_weight(ctx, values.data(), shape, out.data());
}

void py_unpack(Context& ctx, Bytes data, const WeightShape& shape, Array<float, 3> out) {
  const Weight w = weight_of(data, shape);
  check(size(out, 0) == w.groups && size(out, 1) == w.n && size(out, 2) == w.k,
        "out must be [G, N, K]");
  Turn turn(ctx);
  unpack(w, out.data());
}

void py_embed(Context& ctx, AnyConstArray table, Ints1 ids, Array<float, 2> out) {
  check(table.ndim() == 2, "the embedding table must be [V, H]");
  const Elements elements{table.data(), is_bf16(table, "the embedding table")};
  const int64_t tokens = size(ids, 0), width = size(table, 1);
  check(size(out, 0) == tokens && size(out, 1) == width, "out must be [T, H]");
  check_range(ids.data(), tokens, 0, size(table, 0), "token_ids");
  Turn turn(ctx);
  embed(ctx, elements, width, ids.data(), tokens, out.data());
}

void py_linear(Context& ctx, Floats2 x, Bytes data, const WeightShape& shape,
               std::optional<Floats1> bias, Array<float, 2> out) {
  const Weight w = weight_of(data, shape);
  check_equal(w.groups, 1, "number of weight groups");
  check_equal(size(x, 1), w.k, "row length of x");
  check(size(out, 0) == size(x, 0) && size(out, 1) == w.n, "out must be [T, N]");
  if (bias) check_equal(size(*bias, 0), w.n, "bias length");
  Turn turn(ctx);
  linear(ctx, x.data(), size(x, 0), w, bias ? bias->data() : nullptr, out.data());
}

void py_lm_head(Context& ctx, Floats2 x, Bytes data, const WeightShape& shape,
                Array<int32_t, 1> ids, Array<float, 2> logits) {
  const Weight w = weight_of(data, shape);
  const int64_t rows = size(x, 0), num_greedy = size(ids, 0);
  check_equal(w.groups, 1, "number of weight groups");
  check_equal(size(x, 1), w.k, "row length of x");
  check(w.n <= INT32_MAX, "ids are int32: the vocabulary must be below 2^31");
  check(num_greedy + size(logits, 0) == rows && size(logits, 1) == w.n,
        "ids [G] and logits [T - G, V] must have one row per row of x");
  Turn turn(ctx);
  lm_head(ctx, x.data(), rows, w, num_greedy, ids.data(), logits.data());
}

void py_grouped_linear(Context& ctx, Floats3 x, Bytes data, const WeightShape& shape,
                       Array<float, 3> out) {
  const Weight w = weight_of(data, shape);
  check_equal(size(x, 1), w.groups, "number of groups in x");
  check_equal(size(x, 2), w.k, "row length of x");
  check(size(out, 0) == size(x, 0) && size(out, 1) == w.groups && size(out, 2) == w.n,
        "out must be [T, G, N]");
  Turn turn(ctx);
  grouped_linear(ctx, x.data(), size(x, 0), w, out.data());
}

void py_rms_norm(Context& ctx, Floats2 x, Floats1 weight, float eps, Array<float, 2> out) {
  check_equal(size(weight, 0), size(x, 1), "norm weight length");
  check(size(out, 0) == size(x, 0) && size(out, 1) == size(x, 1), "out must be shaped like x");
  Turn turn(ctx);
  rms_norm(ctx, x.data(), weight.data(), size(x, 0), size(x, 1), eps, out.data());
}

void py_add_rms_norm(Context& ctx, Floats2 residual, Floats2 x, Floats1 weight, float eps,
                     Array<float, 2> sum, Array<float, 2> out) {
  const int64_t rows = size(x, 0), n = size(x, 1);
  check_equal(size(weight, 0), n, "norm weight length");
  check(size(residual, 0) == rows && size(residual, 1) == n, "residual must be shaped like x");
  check(size(sum, 0) == rows && size(sum, 1) == n && size(out, 0) == rows && size(out, 1) == n,
        "sum and out must be shaped like x");
  Turn turn(ctx);
  add_rms_norm(ctx, residual.data(), x.data(), weight.data(), rows, n, eps, sum.data(),
               out.data());
}

void py_quantize_rows(Context& ctx, Floats2 x, Array<int8_t, 2> out, Array<float, 1> scales) {
  check(size(out, 0) == size(x, 0) && size(out, 1) == size(x, 1), "out must be shaped like x");
  check_equal(size(scales, 0), size(x, 0), "number of scales");
  Turn turn(ctx);
  quantize_rows(ctx, x.data(), size(x, 0), size(x, 1), out.data(), scales.data());
}

void py_expert_mlp(Context& ctx, Floats2 x, Ints1 counts, Bytes gate_up_data,
                   const WeightShape& gate_up_shape, Bytes down_data,
                   const WeightShape& down_shape, Array<float, 2> out) {
  const Weight gate_up = weight_of(gate_up_data, gate_up_shape);
  const Weight down = weight_of(down_data, down_shape);
  const int64_t rows = size(x, 0);
  check_equal(size(counts, 0), gate_up.groups, "length of num_tokens_per_expert");
  check_equal(down.groups, gate_up.groups, "number of experts in down");
  check_equal(size(x, 1), gate_up.k, "row length of x");
  check_equal(gate_up.n, 2 * down.k, "output features of gate_up");
  check(size(out, 0) == rows && size(out, 1) == down.n, "out must be [R, H]");
  check_range(counts.data(), gate_up.groups, 0, rows + 1, "num_tokens_per_expert");
  int64_t sum = 0;
  for (int64_t e = 0; e < gate_up.groups; ++e) sum += counts.data()[e];
  check_equal(sum, rows, "sum of num_tokens_per_expert");
  Turn turn(ctx);
  expert_mlp(ctx, x.data(), counts.data(), gate_up, down, out.data());
}

void py_combine_topk(Context& ctx, Floats2 rows, Ints2 row_of_slot, Floats2 weights,
                     Array<float, 2> out) {
  const int64_t tokens = size(row_of_slot, 0), top_k = size(row_of_slot, 1);
  check(size(weights, 0) == tokens && size(weights, 1) == top_k,
        "topk_weights must be shaped like row_of_slot");
  check(size(out, 0) == tokens && size(out, 1) == size(rows, 1), "out must be [T, H]");
  check_range(row_of_slot.data(), tokens * top_k, -1, size(rows, 0), "row_of_slot");
  Turn turn(ctx);
  combine_topk(ctx, rows.data(), size(rows, 1), row_of_slot.data(), weights.data(), tokens, top_k,
               out.data());
}

}  // namespace

void bind_dense(nb::class_<Context>& cls) {
  cls.def("pack", &py_pack, "values"_a.noconvert(), "dtype"_a, "out"_a.noconvert())
      .def("unpack", &py_unpack, "data"_a.noconvert(), "shape"_a, "out"_a.noconvert())
      .def("embed", &py_embed, "table"_a.noconvert(), "token_ids"_a.noconvert(),
           "out"_a.noconvert())
      .def("linear", &py_linear, "x"_a.noconvert(), "data"_a.noconvert(), "shape"_a,
           "bias"_a.noconvert().none(), "out"_a.noconvert())
      .def("lm_head", &py_lm_head, "x"_a.noconvert(), "data"_a.noconvert(), "shape"_a,
           "ids"_a.noconvert(), "logits"_a.noconvert())
      .def("grouped_linear", &py_grouped_linear, "x"_a.noconvert(), "data"_a.noconvert(),
           "shape"_a, "out"_a.noconvert())
      .def("rms_norm", &py_rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a,
           "out"_a.noconvert())
      .def("add_rms_norm", &py_add_rms_norm, "residual"_a.noconvert(), "x"_a.noconvert(),
           "weight"_a.noconvert(), "eps"_a, "sum"_a.noconvert(), "out"_a.noconvert())
      .def("quantize_rows", &py_quantize_rows, "x"_a.noconvert(), "out"_a.noconvert(),
           "scales"_a.noconvert())
      .def("expert_mlp", &py_expert_mlp, "x"_a.noconvert(), "counts"_a.noconvert(),
           "gate_up"_a.noconvert(), "gate_up_shape"_a, "down"_a.noconvert(), "down_shape"_a,
           "out"_a.noconvert())
      .def("combine_topk", &py_combine_topk, "rows"_a.noconvert(), "row_of_slot"_a.noconvert(),
           "topk_weights"_a.noconvert(), "out"_a.noconvert());
}

}  // namespace xds
