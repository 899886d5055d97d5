#include "fault.h"

#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include "atomics.h"

namespace xds::xccl {
namespace {

void random_delay() {
  thread_local uint64_t state = static_cast<uint64_t>(now_ns()) | 1;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  const uint64_t choice = state % 64;
  if (choice < 8) sched_yield();
  if (choice == 63) usleep(static_cast<useconds_t>(state >> 32) % 200);
}

}  // namespace

void visit_fault(FaultPoint point) {
  const uint32_t armed = armed_fault.load(std::memory_order_relaxed);
  if (armed == kDelays) return random_delay();
  if (armed != static_cast<uint32_t>(point)) return;
  if (fault_countdown.fetch_sub(1, std::memory_order_relaxed) == 1) kill(getpid(), SIGKILL);
}

const char* fault_name(FaultPoint point) {
  static constexpr const char* kNames[] = {
      "none",        "send_copied",     "send_published", "recv_copied",  "recv_acked",
      "post_copied", "post_published",  "taken",          "reply_copied", "reply_published",
      "reply_seen",  "about_to_sleep",  "link_reset",     "put_copied",   "created"};
  static_assert(sizeof kNames / sizeof *kNames == static_cast<size_t>(FaultPoint::kCount));
  return kNames[static_cast<uint32_t>(point)];
}

}  // namespace xds::xccl
