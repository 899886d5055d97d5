// Kernels for avx512, with attention over bf16 and int8 caches of its own; compiled with the flags
// of that instruction set.
#include <immintrin.h>

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "layout.h"
#include "number.h"

namespace xds {
namespace {
#include "simd_avx512.h"

#include "kernels_table.inl"

#include "kernels_bf16_softmax.inl"
#include "kernels_bf16_attend.inl"
#include "kernels_bf16_few.inl"
#include "kernels_avx512_attend.inl"

constexpr Kernels make_avx512_table() {
  Kernels table = make_table("avx512", attend_bf16);
  table.attend_rows = 128;  // keys and values are paired anew for each task
  return table;
}
}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels table = make_avx512_table();
  return table;
}

}  // namespace xds
