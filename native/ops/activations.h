// Activations in the form that the GEMM of a weight's type reads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "context.h"
#include "layout.h"

namespace xds {

// Rows as panel_gemm reads them.
struct Activations {
  const uint8_t* data;
  ptrdiff_t stride;  // bytes
  const float* row_scale;
};

// Bytes of a row of n int8 activations, and from the coarse to the fine ones of w8a16.
inline int64_t int8_row_bytes(int64_t n) { return round_up(n, 64); }

// The rows of x [rows, n] (row stride `stride`) in the form the GEMM of `dtype` reads. With
// swiglu, a row is silu(x[:n]) * x[n:2n], computed in place first. A product takes every
// `groups`th row.
Activations prepare(Context& ctx, float* x, int64_t rows, int64_t n, int64_t stride, DType dtype,
                    bool swiglu, int64_t groups = 1);

// x is read only: without swiglu, prepare() does not write to it.
inline Activations prepare(Context& ctx, const float* x, int64_t rows, int64_t n, DType dtype,
                           int64_t groups = 1) {
  return prepare(ctx, const_cast<float*>(x), rows, n, n, dtype, false, groups);
}

}  // namespace xds
