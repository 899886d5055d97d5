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

// Byte 0 of the four that an output n of a panel has in octet `octet` of a step.
int64_t octet_offset(int64_t n, int64_t octet) { return octet * kStepBytes + 4 * n; }

// Where the scale of output n of a panel lies in a step; its low lies 2 * kPanel bytes further.
int64_t scale_offset(int64_t n) { return 4 * kStepBytes + (n % 16 * 2 + n / 16) * 2; }

// One group of a row: the smallest value is nibble 0, the largest nibble 15.
void pack_int4_group(const float* row, int64_t count, int64_t n, uint8_t* step) {
  const auto [smallest, largest] = std::minmax_element(row, row + count);
  const uint16_t low_bits = to_bf16(*smallest);
  const uint16_t scale_bits = to_bf16((*largest - *smallest) / 15.0f);
  const float low = from_bf16(low_bits), scale = from_bf16(scale_bits);
  const float inverse = scale < kTinyRow ? 0.0f : 1.0f / scale;
  for (int64_t i = 0; i < count; ++i) {
    const int value = to_int4((row[i] - low) * inverse);
    step[octet_offset(n, i / 8) + i % 4] |= static_cast<uint8_t>(value << (i % 8 / 4 * 4));
  }
  std::memcpy(step + scale_offset(n), &scale_bits, 2);
  std::memcpy(step + scale_offset(n) + 2 * kPanel, &low_bits, 2);
}

void pack_int4_row(const float* row, int64_t k, int64_t n, uint8_t* panel) {
  for (int64_t first = 0; first < k; first += kInt4Group, panel += kInt4StepBytes) {
    pack_int4_group(row + first, std::min(kInt4Group, k - first), n, panel);
  }
}

float int4_element(const uint8_t* panel, int64_t n, int64_t k) {
  const uint8_t* step = panel + k / kInt4Group * kInt4StepBytes;
  const int64_t i = k % kInt4Group;
  const int byte = step[octet_offset(n, i / 8) + i % 4];
  uint16_t scale, low;
  std::memcpy(&scale, step + scale_offset(n), 2);
  std::memcpy(&low, step + scale_offset(n) + 2 * kPanel, 2);
  return static_cast<float>(byte >> (i % 8 / 4 * 4) & 15) * from_bf16(scale) + from_bf16(low);
}

float element(DType dtype, const uint8_t* row, int64_t k, float scale) {
  const uint8_t* at = row + step_offset(k, step_width(dtype));
  if (is_int8(dtype)) return static_cast<float>(static_cast<int8_t>(*at)) * scale;
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
  uint8_t* const panel_start = at;
  for (int64_t n = panel * kPanel; n < (panel + 1) * kPanel; ++n, at += 4) {
    const bool is_padding = n >= shape.n;
    const float* row = values + (group * shape.n + n) * shape.k;
    const int64_t k = is_padding ? 0 : shape.k;
    if (shape.dtype == DType::kInt4) pack_int4_row(row, k, n % kPanel, panel_start);
    if (is_int8(shape.dtype)) pack_int8_row(row, k, at, scales + n, sums + n);
    if (shape.dtype == DType::kBf16) pack_bf16_row(row, k, at);
    if (shape.dtype == DType::kFloat32) pack_float_row(row, k, at);
  }
}

void unpack(const Weight& weight, float* out) {
  const bool is_int4 = weight.dtype == DType::kInt4;
  const bool scaled = is_int8(weight.dtype);
  for (int64_t g = 0; g < weight.groups; ++g) {
    for (int64_t n = 0; n < weight.n; ++n) {
      const uint8_t* panel = weight.panel(g, n / kPanel);
      const uint8_t* row = panel + n % kPanel * 4;
      const float scale = scaled ? weight.scales(g)[n] : 1.0f;
      for (int64_t k = 0; k < weight.k; ++k) {
        *out++ = is_int4 ? int4_element(panel, n % kPanel, k)
                         : element(weight.dtype, row, k, scale);
      }
    }
  }
}

}  // namespace xds
