#include "copy.h"

#include <cstring>

#include "atomics.h"

namespace xds::xccl {
namespace {

constexpr uint64_t kSmallTotal = 64 << 10;
constexpr uint64_t kBlock = 128;
constexpr uint64_t kNear = 64;

using Vector [[gnu::vector_size(16)]] = uint8_t;

inline Vector load(const uint8_t* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(uint8_t* to, Vector value) { std::memcpy(to, &value, sizeof value); }

// The target lies just behind the source, whole pages aside.
inline bool is_alias(const uint8_t* to, const uint8_t* from) {
  const uint64_t behind =
      (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from)) % kPage;
  return behind != 0 && behind < kNear;
}

}  // namespace

// Compiled without the transformation of loops into calls of memcpy (see CMakeLists.txt).
void copy_bytes(uint8_t* to, const uint8_t* from, uint64_t bytes, uint64_t total) {
  if (total <= kSmallTotal && (bytes < kPage || !is_alias(to, from))) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return;
  }
  uint64_t at = 0;
  for (; at + kBlock <= bytes; at += kBlock) {
    Vector block[kBlock / sizeof(Vector)];
    for (uint64_t i = 0; i < kBlock / sizeof(Vector); ++i) block[i] = load(from + at + 16 * i);
    for (uint64_t i = 0; i < kBlock / sizeof(Vector); ++i) store(to + at + 16 * i, block[i]);
  }
  if (at < bytes) std::memcpy(to + at, from + at, bytes - at);
}

}  // namespace xds::xccl
