#include "activations.h"

#include <algorithm>

#include "for_rows.h"

namespace xds {
namespace {

// Bytes of a prepared row of n activations.
int64_t row_bytes(const Kernels& kernels, DType dtype, int64_t n) {
  if (dtype == DType::kInt4) return round_up(n, kInt4Group) / kInt4Group * kInt4RowBytes;
  if (dtype == DType::kW8A8G64) return round_up(n, kInt8Group) / kInt8Group * kInt8GroupBytes;
  if (is_int8(dtype)) return int8_row_bytes(n) * (dtype == DType::kW8A16 ? 2 : 1);
  return round_up(n, step_width(dtype)) * kernels.bf16_item;
}

// Zeros up to the end of a k-step, and the offset that some instructions want.
void finish_int8_row(const Kernels& kernels, int64_t n, uint8_t* row) {
  const int64_t stop = round_up(n, 4);
  std::fill(row + n, row + stop, uint8_t{0});
  if (!kernels.s8_offset) return;
  for (int64_t i = 0; i < stop; ++i) row[i] ^= 0x80;  // + 128
}

void prepare_row(const Kernels& kernels, DType dtype, const float* x, int64_t n, uint8_t* out,
                 float* scale) {
  if (dtype == DType::kBf16) return kernels.prepare_bf16(x, n, out);
  if (dtype == DType::kInt4) return kernels.prepare_int4(x, n, out);
  if (dtype == DType::kW8A8G64) return kernels.prepare_w8a8(x, n, out);
  const int64_t length = int8_row_bytes(n);
  auto* bytes = reinterpret_cast<int8_t*>(out);
  *scale = dtype == DType::kInt8 ? kernels.quantize_row(x, n, bytes)
                                 : kernels.split_row(x, n, bytes, bytes + length);
  finish_int8_row(kernels, n, out);
  if (dtype == DType::kW8A16) finish_int8_row(kernels, n, out + length);
}

}  // namespace

Activations prepare(Context& ctx, float* x, int64_t rows, int64_t n, int64_t stride, DType dtype,
                    bool swiglu, int64_t groups) {
  const Kernels& kernels = ctx.kernels;
  Activations out{reinterpret_cast<const uint8_t*>(x), stride * 4, nullptr};
  if (dtype == DType::kFloat32 && !swiglu) return out;
  uint8_t* data = nullptr;
  float* scales = nullptr;
  if (dtype != DType::kFloat32) {
    out.stride = round_up(row_bytes(kernels, dtype, n), 64);
    out.data = data = ctx.activations.get<uint8_t>((rows + kRowSlack * groups) * out.stride);
    out.row_scale = scales = ctx.row_scales.get<float>(rows);
  }
  for_rows(ctx, rows, n, [&](int64_t row, int) {
    float* values = x + row * stride;
    if (swiglu) kernels.silu_mul_row(values, values + n, n, values);
    if (data) prepare_row(kernels, dtype, values, n, data + row * out.stride, scales + row);
  });
  return out;
}

}  // namespace xds
