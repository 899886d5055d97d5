#include "copy.h"

#include <cstring>

#if defined(__x86_64__)
#define XDS_WIDE [[gnu::target("avx2")]]
#else
#define XDS_WIDE
#endif

namespace xds::xccl {
namespace {

constexpr uint64_t kSmall = 2 << 10;  // the C library's threshold for strings lies above
constexpr uint64_t kBlock = 128;

// Whole blocks, by vectors of `kWidth` bytes; returns the bytes copied.
template <uint64_t kWidth>
[[gnu::always_inline]] inline uint64_t copy_blocks(uint8_t* to, const uint8_t* from,
                                                   uint64_t bytes) {
  using Vector [[gnu::vector_size(kWidth)]] = uint8_t;
  constexpr uint64_t kCount = kBlock / kWidth;
  uint64_t at = 0;
  for (; at + kBlock <= bytes; at += kBlock) {
    Vector block[kCount];
    for (uint64_t i = 0; i < kCount; ++i) std::memcpy(&block[i], from + at + kWidth * i, kWidth);
    for (uint64_t i = 0; i < kCount; ++i) std::memcpy(to + at + kWidth * i, &block[i], kWidth);
  }
  return at;
}

uint64_t copy_narrow(uint8_t* to, const uint8_t* from, uint64_t bytes) {
  return copy_blocks<16>(to, from, bytes);
}

XDS_WIDE uint64_t copy_wide(uint8_t* to, const uint8_t* from, uint64_t bytes) {
  return copy_blocks<32>(to, from, bytes);
}

bool has_wide() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

const bool is_wide = has_wide();

}  // namespace

// Compiled without the transformation of loops into calls of memcpy (see CMakeLists.txt).
void copy_bytes(uint8_t* to, const uint8_t* from, uint64_t bytes) {
  uint64_t at = 0;
  if (bytes > kSmall) at = is_wide ? copy_wide(to, from, bytes) : copy_narrow(to, from, bytes);
  if (at < bytes) std::memcpy(to + at, from + at, bytes - at);
}

}  // namespace xds::xccl
