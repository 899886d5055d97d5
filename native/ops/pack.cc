// Packing and unpacking of weights; runs once per model, so plain loops.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "layout.h"
#include "number.h"

namespace xds {
namespace {

// Every k-step holds 4 bytes of each of the 32 outputs, so an output's bytes advance like this.
int64_t step_offset(int64_t k, int64_t width) {
  return k / width * kStepBytes + k % width * (4 / width);
}

void pack_int8_row(const float* row, int64_t k, uint8_t* at, float* scale_out, int32_t* sum_out) {
  float largest = 0.0f;
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(row[i]));
  const Int8Scale scale = int8_scale(largest);
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int8_t value = to_int8(row[i] * scale.inverse);
    at[step_offset(i, 4)] = static_cast<uint8_t>(value);
    sum += value;
  }
  *scale_out = scale.scale;
  *sum_out = sum;
}

void pack_bf16_row(const float* row, int64_t k, uint8_t* at) {
  for (int64_t i = 0; i < k; ++i) {
    const uint16_t bits = to_bf16(row[i]);
    std::memcpy(at + step_offset(i, 2), &bits, 2);
  }
}

void pack_float_row(const float* row, int64_t k, uint8_t* at) {
  for (int64_t i = 0; i < k; ++i) std::memcpy(at + step_offset(i, 1), row + i, 4);
}

float element(DType dtype, const uint8_t* row, int64_t k, float scale) {
  const uint8_t* at = row + step_offset(k, step_width(dtype));
  if (dtype == DType::kInt8) return static_cast<float>(static_cast<int8_t>(*at)) * scale;
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, at, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return from_bf16(bits);
}

}  // namespace

void pack_panel(const float* values, const Weight& shape, int64_t group, int64_t panel,
                uint8_t* out) {
  uint8_t* base = out + group * shape.group_bytes();
  uint8_t* at = base + panel * shape.panel_bytes();
  auto* scales = reinterpret_cast<float*>(base + shape.panels() * shape.panel_bytes());
  auto* sums = reinterpret_cast<int32_t*>(scales + shape.panels() * kPanel);
  std::fill_n(at, shape.panel_bytes(), uint8_t{0});
  for (int64_t n = panel * kPanel; n < (panel + 1) * kPanel; ++n, at += 4) {
    const bool is_padding = n >= shape.n;
    const float* row = values + (group * shape.n + n) * shape.k;
    const int64_t k = is_padding ? 0 : shape.k;
    if (shape.dtype == DType::kInt8) pack_int8_row(row, k, at, scales + n, sums + n);
    if (shape.dtype == DType::kBf16) pack_bf16_row(row, k, at);
    if (shape.dtype == DType::kFloat32) pack_float_row(row, k, at);
  }
}

void unpack(const Weight& weight, float* out) {
  const bool scaled = weight.dtype == DType::kInt8;
  for (int64_t g = 0; g < weight.groups; ++g) {
    for (int64_t n = 0; n < weight.n; ++n) {
      const uint8_t* row = weight.panel(g, n / kPanel) + n % kPanel * 4;
      const float scale = scaled ? weight.scales(g)[n] : 1.0f;
      for (int64_t k = 0; k < weight.k; ++k) *out++ = element(weight.dtype, row, k, scale);
    }
  }
}

}  // namespace xds
