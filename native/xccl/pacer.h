// How long to spin, how long to yield, when to sleep. Spinning wins when the other side runs on a core
// of its own and answers soon; on a shared core it only delays the answer. Nobody is told which it is:
// a yield that took long gave the core to somebody, a wait that ended soon after we went to sleep
// should have been spun.
//
//   spin (pause)  --spin_ns-->  yield (sched_yield)  --yield_ns or a long yield-->  futex
//
//   saw                                           so
//   a yield longer than kSwitchNs                 the core is shared: spin half as long
//   a yield longer than kHogNs                    somebody computes here: sleep now, yield half as long
//   an answer, and no such yield before it        both budgets grow by an eighth
//   an answer within kMaxYieldNs though we slept  both budgets double
#pragma once

#include <algorithm>
#include <cstdint>

namespace xds::xccl {

class Pacer {
 public:
  static constexpr int64_t kMaxSpinNs = 20'000;
  static constexpr int64_t kMaxYieldNs = 200'000;
  static constexpr int64_t kMinSpinNs = 250;
  static constexpr int64_t kMinYieldNs = 2'000;
  static constexpr int64_t kSwitchNs = 1'000;
  static constexpr int64_t kHogNs = 60'000;

  int64_t spin_ns() const { return spin_ns_; }
  int64_t yield_ns() const { return yield_ns_; }

  void begin() { is_shared_ = false; }
  // True when the waiter should go to sleep at once.
  bool yielded(int64_t took_ns) {
    if (took_ns > kSwitchNs) {
      is_shared_ = true;
      spin_ns_ = std::max(kMinSpinNs, spin_ns_ / 2);
    }
    if (took_ns <= kHogNs) return false;
    yield_ns_ = std::max(kMinYieldNs, yield_ns_ / 2);
    return true;
  }
  void answered_awake() {
    if (!is_shared_) grow(spin_ns_ / 8, yield_ns_ / 8);
  }
  void answered_asleep(int64_t waited_ns) {
    if (waited_ns < kMaxYieldNs && !is_shared_) grow(spin_ns_, yield_ns_);
  }

 private:
  void grow(int64_t spin, int64_t yield) {
    spin_ns_ = std::min(kMaxSpinNs, spin_ns_ + spin);
    yield_ns_ = std::min(kMaxYieldNs, yield_ns_ + yield);
  }

  bool is_shared_ = false;  // a yield of this wait gave the core away
  int64_t spin_ns_ = kMaxSpinNs;
  int64_t yield_ns_ = kMaxYieldNs;
};

}  // namespace xds::xccl
