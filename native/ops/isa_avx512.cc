// Kernels for avx512; compiled with the flags of that instruction set.
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
}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels table = make_table("avx512");
  return table;
}

}  // namespace xds
