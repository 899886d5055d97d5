// The compiled module `xdeepserve._native`: what the machine has, and the operators.
#include "arrays.h"

namespace xds {

using namespace nb::literals;

namespace {

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "amx"};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* name : kIsaNames) {
    if (find_kernels(name) != nullptr) names.emplace_back(name);
  }
  return names;
}

void init_context(Context* self, const std::string& isa, int num_threads) {
  const Kernels* kernels = find_kernels(isa.c_str());
  if (kernels == nullptr) fail("instruction set " + isa + " is not available on this machine");
  check(num_threads >= 1 && num_threads <= 1024, "num_threads must lie in [1, 1024]");
  new (self) Context(*kernels, num_threads);
}

int64_t packed_bytes(int dtype, int64_t groups, int64_t n, int64_t k) {
  const Weight shape = weight_shape(dtype, groups, n, k);
  return shape.groups * shape.group_bytes();
}

double py_read_bandwidth(Context& ctx, int64_t bytes, int repeats) {
  check(bytes >= 1 && repeats >= 1, "bytes and repeats must be positive");
  Turn turn(ctx);
  return read_bandwidth(ctx, bytes, repeats);
}

double py_gemm_peak(Context& ctx, int dtype, int repeats) {
  check(dtype >= 0 && dtype < kDTypes && repeats >= 1, "dtype or repeats out of range");
  Turn turn(ctx);
  return gemm_peak(ctx, static_cast<DType>(dtype), repeats);
}

// Name -> (calls, nanoseconds) since the context was made.
nb::dict op_times(Context& ctx) {
  const std::lock_guard<std::mutex> lock(ctx.mutex);
  nb::dict found;
  for (int op = 0; op < static_cast<int>(Op::kCount); ++op) {
    const OpTimes::Entry& entry = ctx.times.entries[op];
    found[kOpNames[op]] = nb::make_tuple(entry.calls, entry.ns);
  }
  return found;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native core: operators on packed weights, one kernel table per instruction set.";
  m.attr("LAYOUT") = "panel32/1";
  m.attr("COMPILER") = XDS_COMPILER;
  m.def("available_isas", &available_isas);
  m.def("packed_bytes", &packed_bytes, "dtype"_a, "groups"_a, "n"_a, "k"_a);
  nb::class_<Context> cls(m, "Context");
  cls.def("__init__", &init_context, "isa"_a, "num_threads"_a)
      .def_prop_ro("isa", [](const Context& ctx) { return std::string(ctx.kernels.name); })
      .def_prop_ro("num_threads", [](const Context& ctx) { return ctx.pool.size(); })
      .def("op_times", &op_times)
      .def("read_bandwidth", &py_read_bandwidth, "bytes"_a, "repeats"_a)
      .def("gemm_peak", &py_gemm_peak, "dtype"_a, "repeats"_a);
  bind_views(m);
  bind_dense(cls);
  bind_attention(cls);
  bind_choice(cls);
  bind_layer(m, cls);
  bind_stack(m, cls);
}

}  // namespace xds
