#include "rows.h"

#include <algorithm>
#include <cmath>

#include "../ops/number.h"
#include "copy.h"

namespace xds::xccl {
namespace {

constexpr uint32_t kLanes = 16;

inline float largest_of(float a, float b) { return a > b ? a : b; }

template <class Load>
float quantize(Load load, uint32_t width, int8_t* out) {
  float lanes[kLanes] = {};
  uint32_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (uint32_t j = 0; j < kLanes; ++j) {
      lanes[j] = largest_of(std::fabs(load(i + j)), lanes[j]);
    }
  }
  float largest = 0.0f;
  for (; i < width; ++i) largest = largest_of(std::fabs(load(i)), largest);
  for (const float lane : lanes) largest = largest_of(lane, largest);
  const Int8Scale scale = int8_scale(largest);
  for (uint32_t k = 0; k < width; ++k) out[k] = to_int8(load(k) * scale.inverse);
  return scale.scale;
}

template <class Use>
void with_row(const uint8_t* row, RowType type, float scale, Use use) {
  switch (type) {
    case RowType::kFloat32: {
      const auto* values = reinterpret_cast<const float*>(row);
      return use([values](uint32_t i) { return values[i]; });
    }
    case RowType::kBfloat16: {
      const auto* values = reinterpret_cast<const uint16_t*>(row);
      return use([values](uint32_t i) { return from_bf16(values[i]); });
    }
    case RowType::kInt8: {
      const auto* values = reinterpret_cast<const int8_t*>(row);
      return use([values, scale](uint32_t i) { return scale * static_cast<float>(values[i]); });
    }
    case RowType::kBytes:
      return;  // has no value; refused before
  }
}

}  // namespace

float quantize_row(const float* x, uint32_t width, int8_t* out) {
  return quantize([x](uint32_t i) { return x[i]; }, width, out);
}

void copy_rows(const RowSource& source, const int32_t* row_idx, uint32_t count, float* scales,
               uint8_t* rows) {
  const uint64_t bytes = uint64_t{source.width} * item_bytes(source.type);
  const auto index = [row_idx](uint32_t i) { return row_idx ? static_cast<uint64_t>(row_idx[i]) : i; };
  if (source.quantize) {
    for (uint32_t i = 0; i < count; ++i) {
      auto* out = reinterpret_cast<int8_t*>(rows + uint64_t{i} * source.width);
      with_row(source.rows + index(i) * bytes, source.type, 1.0f, [&](auto load) {
        scales[i] = quantize(load, source.width, out);
      });
    }
    return;
  }
  if (source.type == RowType::kInt8) {
    for (uint32_t i = 0; i < count; ++i) scales[i] = source.scales[index(i)];
  }
  if (row_idx == nullptr) {
    copy_bytes(rows, source.rows, count * bytes, count * bytes);
    return;
  }
  for (uint32_t i = 0; i < count; ++i) {
    copy_bytes(rows + i * bytes, source.rows + index(i) * bytes, bytes, count * bytes);
  }
}

void add_row(float weight, const uint8_t* row, RowType type, float scale, uint32_t width,
             float* sum) {
  with_row(row, type, scale, [&](auto load) {
    for (uint32_t i = 0; i < width; ++i) sum[i] += weight * load(i);
  });
}

void read_row(const uint8_t* row, RowType type, float scale, uint32_t width, float* out) {
  with_row(row, type, scale, [&](auto load) {
    for (uint32_t i = 0; i < width; ++i) out[i] = load(i);
  });
}

}  // namespace xds::xccl
