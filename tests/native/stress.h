// What the native stress programs share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "layout.h"

namespace xds::xccl {

inline constexpr int64_t kLimitNs = 50'000'000'000;  // without progress

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::_Exit(1);
}

inline void require(bool ok, const char* what) {
  if (!ok) fail(what);
}

inline LayoutParams small_layout(uint32_t num_ranks) {
  LayoutParams params;
  params.max_ranks = num_ranks;
  params.p2p_slots = 4;
  params.p2p_slot_bytes = 256;
  params.row_slots = 2;
  params.request_bytes = params.reply_bytes = 4096;
  params.window_bytes = 64;
  return params;
}

}  // namespace xds::xccl
