// Argument types and checks shared by the bindings. A failed check raises ValueError with the
// value and the limit; wrong dtypes and ranks are TypeErrors of nanobind.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "../ops/ops.h"

namespace xds {

namespace nb = nanobind;

template <class T, int Rank>
using Array = nb::ndarray<T, nb::ndim<Rank>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<const uint8_t, 1>;
using MutableBytes = Array<uint8_t, 1>;
using Floats1 = Array<const float, 1>;
using Floats2 = Array<const float, 2>;
using Floats3 = Array<const float, 3>;
using Ints1 = Array<const int32_t, 1>;
using Ints2 = Array<const int32_t, 2>;
using AnyArray = nb::ndarray<nb::c_contig, nb::device::cpu>;
using OptionalScales = std::optional<Array<float, 4>>;
using AnyConstArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

template <class A>
int64_t size(const A& array, size_t axis) {
  return static_cast<int64_t>(array.shape(axis));
}

[[noreturn]] inline void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

inline void check(bool ok, const char* message) {
  if (!ok) fail(message);
}

inline void check_equal(int64_t value, int64_t expected, const char* what) {
  if (value == expected) return;
  fail(std::string(what) + " is " + std::to_string(value) + "; it must be " +
       std::to_string(expected));
}

// Every element must lie in [low, high).
inline void check_range(const int32_t* values, int64_t count, int64_t low, int64_t high,
                        const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= low && values[i] < high) continue;
    fail(std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(values[i]) +
         "; it must lie in [" + std::to_string(low) + ", " + std::to_string(high) + ")");
  }
}

// True when the array holds bfloat16 bits (uint16), false when float32.
template <class A>
bool is_bf16(const A& array, const char* what) {
  if (array.dtype() == nb::dtype<uint16_t>()) return true;
  if (array.dtype() == nb::dtype<float>()) return false;
  throw nb::type_error((std::string(what) + " must be float32, or uint16 bfloat16 bits").c_str());
}

// What a cache array holds; int8 only where scales go with it.
template <class A>
KvType kv_type(const A& array, bool has_scales, const char* what) {
  if (!has_scales) return is_bf16(array, what) ? KvType::kBf16 : KvType::kFloat32;
  if (array.dtype() == nb::dtype<int8_t>()) return KvType::kInt8;
  throw nb::type_error((std::string(what) + " must be int8, as it has scales").c_str());
}

// A PackedWeight as seen from Python: its bytes, dtype number and (G, N, K).
Weight view_weight(const Bytes& data, int dtype, int64_t groups, int64_t n, int64_t k);
Weight weight_shape(int dtype, int64_t groups, int64_t n, int64_t k);

// The cache arrays of a layer as the operators see them.
Cache view_cache(const AnyArray& keys, const AnyArray& values, const OptionalScales& scales);
Cache view_latents(const AnyArray& keys);
void check_gate(const Gate& gate);

void bind_dense(nb::class_<Context>& cls);
void bind_attention(nb::class_<Context>& cls);
void bind_choice(nb::class_<Context>& cls);
void bind_views(nb::module_& m);
void bind_layer(nb::module_& m, nb::class_<Context>& cls);
void bind_stack(nb::module_& m, nb::class_<Context>& cls);

// Takes the context for one operator: no other thread runs in it, and Python is free to go on.
class Turn {
 public:
  explicit Turn(Context& ctx) : lock_(ctx.mutex) { ctx.kernels.begin_operator(); }

 private:
  nb::gil_scoped_release release_;  // before the lock: never wait for it while holding the GIL
  std::lock_guard<std::mutex> lock_;
};

}  // namespace xds
