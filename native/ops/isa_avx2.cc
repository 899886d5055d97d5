// Kernels for avx2; compiled with the flags of that instruction set.
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
#include "simd_avx2.h"

#include "kernels_table.inl"
}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels table = make_table("avx2", attend_plain);
  return table;
}

}  // namespace xds
