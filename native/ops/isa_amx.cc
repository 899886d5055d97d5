// Kernels for avx512 with tile registers (AMX): the same vector type; GEMMs and attention
// over bf16 and int8 caches of their own.
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
#include "kernels_amx.inl"
#include "kernels_amx_attend.inl"

constexpr Kernels make_amx_table() {
  Kernels table = make_table("amx", attend_tiles);
  table.begin_operator = forget_tiles;
  table.panel_gemm[1] = bf16_gemm;
  table.panel_gemm[2] = int8_gemm;
  table.panel_gemm[4] = w8a16_gemm;
  table.attend_rows = 128;  // tiles pair keys and values anew for each task
  table.merge_parts = merge_tile_parts;
  return table;
}
}  // namespace

const Kernels& amx_kernels() {
  static constexpr Kernels table = make_amx_table();
  return table;
}

}  // namespace xds
