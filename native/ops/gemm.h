// The parts of a linear layer that other operators build on: prepared rows and panel products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "context.h"
#include "layout.h"

namespace xds {

inline constexpr int64_t kRowChunk = 120;  // rows of one work item; the panel stays in cache for them
inline constexpr int64_t kSmallWork = 16384;  // elements below which waking threads costs more

// Rows as panel_gemm reads them.
struct Activations {
  const uint8_t* data;
  ptrdiff_t stride;  // bytes
  const float* row_scale;
};

// The rows of x that meet one group of a weight, and where the results go.
struct Product {
  const uint8_t* a;
  ptrdiff_t a_stride;
  int64_t rows;
  const float* row_scale;
  int64_t row_scale_stride;
  int64_t group;
  float* c;
  int64_t c_stride;
};

// The rows of x [rows, n] in the form the GEMM of `dtype` reads; in ctx.activations.
Activations prepare(Context& ctx, const float* x, int64_t rows, int64_t n, DType dtype);

// Up to kRowChunk rows from first_row on times one panel. `ahead` is how many panels later this
// thread is likely to be.
PanelTask panel_task(int64_t ahead, const Product& p, const Weight& w, int64_t panel,
                     int64_t first_row, const float* bias);

}  // namespace xds
