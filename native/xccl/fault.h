// Points of the protocols at which a test may kill the process or delay it. Unarmed, a point costs
// one load of a word that never changes.
#pragma once

#include <atomic>
#include <cstdint>

namespace xds::xccl {

enum class FaultPoint : uint32_t {
  kNone = 0,
  kSendCopied,       // payload in the slot, not published
  kSendPublished,    // published, the receiver not woken
  kRecvCopied,       // payload taken, credit not given
  kRecvAcked,        // credit given, the sender not woken
  kPostCopied,       // request in the slot, not published
  kPostPublished,    // request published, the server not woken
  kTaken,            // request seen by the server
  kReplyCopied,      // reply in the slot, not published
  kReplyPublished,   // reply published, the asker not woken
  kReplySeen,        // reply seen by the asker
  kAboutToSleep,     // sleeping = 1, before the futex
  kLinkReset,        // attach: old session wiped, new one not announced
  kPutCopied,        // window written, nobody woken
  kCreated,          // segment file made, not ready
  kCount,
};

// 0: off. A point's number: SIGKILL at its `countdown`-th visit. kDelays: random delays everywhere.
inline constexpr uint32_t kDelays = 0xFFFF;
inline std::atomic<uint32_t> armed_fault{0};
inline std::atomic<uint32_t> fault_countdown{0};

void visit_fault(FaultPoint point);

inline void fault_point(FaultPoint point) {
  if (armed_fault.load(std::memory_order_relaxed) != 0) [[unlikely]] visit_fault(point);
}

const char* fault_name(FaultPoint point);

}  // namespace xds::xccl
