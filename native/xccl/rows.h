// Copying rows: gather, optional int8 quantization on the way, and reading them back as float32.
#pragma once

#include <cstdint>

#include "messages.h"

namespace xds::xccl {

// Rows in the caller's memory, on their way into a slot.
struct RowSource {
  RowType type = RowType::kFloat32;
  bool quantize = false;  // float32 or bfloat16 rows travel as int8 + one scale each
  const uint8_t* rows = nullptr;
  const float* scales = nullptr;  // int8 rows only
  uint32_t num_rows = 0;
  uint32_t width = 0;  // items of a row

  RowType sent_type() const { return quantize ? RowType::kInt8 : type; }
  uint32_t sent_row_bytes() const { return width * item_bytes(sent_type()); }
};

// Copies rows row_idx[0..count) of the source (all in order when row_idx is null) to `rows`, and
// their scales to `scales` where the sent type has them.
void copy_rows(const RowSource& source, const int32_t* row_idx, uint32_t count, float* scales,
               uint8_t* rows);

// Same rounding as the operators' quantize_rows: scale = max|x| / 127, half to even, [-127, 127].
float quantize_row(const float* x, uint32_t width, int8_t* out);

// sum += weight * row, item by item, without contraction.
void add_row(float weight, const uint8_t* row, RowType type, float scale, uint32_t width,
             float* sum);
void read_row(const uint8_t* row, RowType type, float scale, uint32_t width, float* out);

}  // namespace xds::xccl
