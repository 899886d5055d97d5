// Packed weights, layout "panel32/1": the same bytes for every instruction set, so that one cache
// file serves every machine.
//
// A weight is G groups (experts or heads) of N output features by K inner features. N is padded to
// Np = a multiple of 32 (one panel = 32 outputs), K to Kp = a multiple of 1 (float32), 2 (bf16),
// 4 (int8) or 32 (int4); padding is zero. Element (n, k) of a panel, n counted within the panel:
//
//   float32   [Np/32][Kp]  [32]        one k-step  = 128 bytes: n0 n1 ... n31
//   bf16      [Np/32][Kp/2][32][2]     one k-pair  = 128 bytes: n0k0 n0k1 n1k0 n1k1 ... n31k1
//   int8,     [Np/32][Kp/4][32][4]     one k-quad  = 128 bytes: n0k0 n0k1 n0k2 n0k3 n1k0 ... n31k3
//   w8a16, w8a8g64
//   int4      [Np/32][Kp/32][640]      one step of 32 k: 4 k-octets of 128 bytes, then 64 bf16 pairs
//     octet   [32][4]                  byte j of output n: k = j in the low nibble, 4 + j in the high
//     scales  [16][2]                  n0 n16 n1 n17 ... n15 n31, bf16
//     lows    [16][2]                  the same order; weight = scale * nibble + low
//
// One group in memory; every part is a multiple of 128 bytes, so groups need no further padding:
//
//   +-----------------------------+---------------------+------------------------+
//   | panels (as above)           | int8 and its kin:   | int8 and its kin:      |
//   | Np * Kp * element size      | scale f32[Np]       | column sum i32[Np]     |
//   +-----------------------------+---------------------+------------------------+
//
// The column sums serve instructions that multiply unsigned by signed bytes: they see
// activation + 128, and 128 * column sum is subtracted from the exact int32 result.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xds {

enum class DType { kFloat32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3, kW8A16 = 4, kW8A8G64 = 5 };

inline constexpr int kDTypes = 6;

inline constexpr int64_t kPanel = 32;       // output features of one panel
inline constexpr int64_t kStepBytes = 128;  // bytes of one k-step of a panel; int4: of an octet
inline constexpr int64_t kInt4Group = 32;  // inner features that share a scale and a low
inline constexpr int64_t kInt4StepBytes = 4 * kStepBytes + 2 * 2 * kPanel;
inline constexpr int64_t kInt8Group = 64;  // w8a8g64: activations that share a scale
inline constexpr int64_t kMaxInner = 131072;  // K limit: 127 * 127 * K stays below 2^31

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Inner features in one k-step.
inline int64_t step_width(DType dtype) {
  constexpr int64_t kWidths[kDTypes] = {1, 2, 4, kInt4Group, 4, 4};
  return kWidths[static_cast<int>(dtype)];
}

inline int64_t step_bytes(DType dtype) {
  return dtype == DType::kInt4 ? kInt4StepBytes : kStepBytes;
}

// The weights themselves are the same bytes.
inline bool is_int8(DType dtype) {
  return dtype == DType::kInt8 || dtype == DType::kW8A16 || dtype == DType::kW8A8G64;
}

// One packed weight: where its parts lie.
struct Weight {
  DType dtype = DType::kFloat32;
  int64_t groups = 0;
  int64_t n = 0;
  int64_t k = 0;
  const uint8_t* data = nullptr;

  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t steps() const { return round_up(k, step_width(dtype)) / step_width(dtype); }
  int64_t panel_bytes() const { return steps() * step_bytes(dtype); }
  int64_t group_bytes() const {
    const int64_t tail = is_int8(dtype) ? panels() * kPanel * 8 : 0;
    return panels() * panel_bytes() + tail;
  }
  const uint8_t* panel(int64_t group, int64_t index) const {
    return data + group * group_bytes() + index * panel_bytes();
  }
  const float* scales(int64_t group) const {
    return reinterpret_cast<const float*>(panel(group, panels()));
  }
  const int32_t* column_sums(int64_t group) const {
    return reinterpret_cast<const int32_t*>(scales(group) + panels() * kPanel);
  }
};

// Pack one panel of row-major values [groups, n, k] into `out` of groups * group_bytes() bytes;
// all panels together fill it.
void pack_panel(const float* values, const Weight& shape, int64_t group, int64_t panel,
                uint8_t* out);

// The float32 values [groups, n, k] that a GEMM sees.
void unpack(const Weight& weight, float* out);

}  // namespace xds
