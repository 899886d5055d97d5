// Scalar conversions shared by packing and kernels. Internal linkage on purpose: each instruction
// set compiles its own copy, and the linker must never pick one of them for all.
#pragma once

#include <cstdint>
#include <cstring>

namespace xds {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Nearest bfloat16, ties to even; NaN stays NaN.
[[maybe_unused]] inline uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

[[maybe_unused]] inline float from_bf16(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}

inline constexpr float kTinyRow = 0x1p-100f;  // rows below this count as zero

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
inline constexpr float kRoundMagic = 12582912.0f;

// The nearest integer within [low, high]; NaN becomes low.
[[maybe_unused]] inline float round_between(float value, float low, float high) {
  const float above = value > low ? value : low;
  const float clamped = above < high ? above : high;
  return (clamped + kRoundMagic) - kRoundMagic;
}

// Round value to [-127, 127]; NaN becomes -127 (the row's scale keeps the trouble visible).
[[maybe_unused]] inline int8_t to_int8(float value) {
  return static_cast<int8_t>(static_cast<int32_t>(round_between(value, -127.0f, 127.0f)));
}

// Largest magnitude of 15 bits that is 128 * coarse + fine with both in [-127, 127].
inline constexpr float kSplitMax = 128.0f * 127.0f + 63.0f;

// Round value to [0, 15]; NaN becomes 0.
[[maybe_unused]] inline int to_int4(float value) {
  return static_cast<int>(round_between(value, 0.0f, 15.0f));
}

struct Int8Scale {
  float inverse;
  float scale;
};

[[maybe_unused]] inline Int8Scale int8_scale(float largest) {
  if (largest < kTinyRow) return {0.0f, 0.0f};
  return {127.0f / largest, largest / 127.0f};
}

}  // namespace
}  // namespace xds
