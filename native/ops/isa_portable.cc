// Kernels for portable; compiled with the flags of that instruction set.
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
#include "simd_portable.h"

#include "kernels_table.inl"
}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels table = make_table("portable", attend_plain);
  return table;
}

}  // namespace xds
