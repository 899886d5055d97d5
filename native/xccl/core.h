// One rank's place in the run: its segment, its peers, waiting, waking and liveness. The primitives
// (p2p, rows, window) are built on it and own nothing shared of their own.
//
// Thread: one at a time; `beat` and `ring_self` may be called from any.
#pragma once

#include <sched.h>

#include <memory>
#include <span>
#include <vector>

#include "fault.h"
#include "liveness.h"
#include "messages.h"
#include "pacer.h"
#include "segment.h"
#include "status.h"

namespace xds::xccl {

struct Peer {
  std::shared_ptr<Segment> segment;  // null: never attached
  uint64_t incarnation = 0;
  Pulse pulse;
};

class Core {
 public:
  static constexpr int64_t kLookEveryNs = 5'000'000;  // at each of those who owe an answer
  static constexpr int64_t kSleepNs = 20'000'000;     // longest nap: bounds a lost wake-up
  static constexpr int kSpinsPerClock = 16;

  Core(std::shared_ptr<Segment> own, int64_t frozen_after_ns);

  uint32_t rank() const { return own_->header().rank; }
  uint64_t incarnation() const { return own_->header().incarnation; }
  const Layout& layout() const { return own_->layout(); }
  const LayoutParams& params() const { return own_->layout().params; }
  Segment& own() { return *own_; }
  const std::shared_ptr<Segment>& own_segment() const { return own_; }

  // Installs a life of a peer: wipes what this rank's segment holds for the rank's former life, then
  // announces the new session. Throws SegmentFault: other run, other layout, older incarnation.
  void attach(std::shared_ptr<Segment> segment);

  bool is_attached(uint32_t rank) const {
    return rank < peers_.size() && peers_[rank].segment != nullptr;
  }
  Peer& peer(uint32_t rank) { return peers_[rank]; }
  // The peer's side of the link names this life of ours, so its words mean us: those that are loaded
  // after it. What was loaded before may be of its session with our former life.
  bool is_linked(uint32_t rank) const {
    return load_acquire(peers_[rank].segment->link(this->rank()).peer_incarnation) ==
           incarnation();
  }
  // Looks at the peer's life now.
  PeerState look(uint32_t rank);
  bool is_gone(uint32_t rank) {
    return peers_[rank].pulse.state() == PeerState::kDead ||
           peers_[rank].pulse.state() == PeerState::kAbsent;
  }

  // Shows that the owner's loop is alive. Two threads that beat at once may count as one.
  void beat() {
    uint64_t& word = own_->live().heartbeat;
    store_relaxed(word, load_relaxed(word) + 1);
  }
  // After a release store that the peer may wait for: wakes it if it sleeps.
  void wake(uint32_t rank) {
    full_fence();
    const Segment& segment = *peers_[rank].segment;
    if (load_relaxed(segment.sleep().sleeping) != 0) ring(segment);
  }
  void ring_self() { ring(*own_); }

  // Until ready() or the deadline; kPeerLost once a rank of owed() is dead or frozen. owed() is asked
  // after ready(), so a rank that answered and then left owes nothing. A ring of any peer makes it
  // ask ready() again. A wait that is not met looks at those of owed() that nobody looked at for
  // kLookEveryNs, so that many short ones, or ones of no time, learn what a long one does.
  template <class Ready, class Owed>
  Status wait(Ready&& ready, int64_t deadline_ns, Owed&& owed);

  // Naps until a ring, the time or a signal; `awake` is asked after the flag is up.
  template <class Ready>
  bool nap(Ready&& ready, int64_t until_ns);

 private:
  static void ring(const Segment& segment);
  void wipe_session(uint32_t rank);
  bool someone_lost(std::span<const uint32_t> owed, int64_t now);

  std::shared_ptr<Segment> own_;
  std::vector<Peer> peers_;
  Pacer pacer_;
  int64_t frozen_after_ns_;
};

// Sleeps while `word` holds `seen`, at most until `until_ns`.
void futex_wait(uint32_t& word, uint32_t seen, int64_t until_ns);

template <class Ready>
bool Core::nap(Ready&& ready, int64_t until_ns) {
  uint32_t& flag = own_->sleep().sleeping;
  const uint32_t seen = load_acquire(own_->doorbell().word);
  store_relaxed(flag, uint32_t{1});
  full_fence();
  fault_point(FaultPoint::kAboutToSleep);
  bool is_ready = ready();
  if (!is_ready) futex_wait(own_->doorbell().word, seen, until_ns);
  store_relaxed(flag, uint32_t{0});
  return is_ready || ready();
}

template <class Ready, class Owed>
Status Core::wait(Ready&& ready, int64_t deadline_ns, Owed&& owed) {
  if (ready()) return Status::kOk;
  for (const uint32_t rank : owed()) {
    if (is_gone(rank)) return Status::kPeerLost;
  }
  const int64_t start = now_ns();
  int64_t now = start;
  pacer_.begin();
  const int64_t spin_until = std::min(deadline_ns, start + pacer_.spin_ns());
  while (now < spin_until) {
    for (int i = 0; i < kSpinsPerClock; ++i) {
      cpu_relax();
      if (ready()) return pacer_.answered_awake(), Status::kOk;
    }
    now = now_ns();
  }
  beat();
  const int64_t yield_until = std::min(deadline_ns, now + pacer_.yield_ns());
  for (bool hogged = false; now < yield_until && !hogged;) {
    sched_yield();
    const int64_t later = now_ns();
    hogged = pacer_.yielded(later - now);
    now = later;
    if (ready()) return pacer_.answered_awake(), Status::kOk;
  }
  for (int64_t look_at = start + kLookEveryNs;;) {
    beat();
    const bool is_over = now >= deadline_ns;
    if (is_over || now >= look_at) {
      look_at = now + kLookEveryNs;
      if (someone_lost(owed(), now)) {  // what it published before is visible by now: ask again
        if (ready()) return Status::kOk;
        if (someone_lost(owed(), now)) return Status::kPeerLost;
      }
    }
    if (is_over) return ready() ? Status::kOk : Status::kTimeout;
    const int64_t nap_end = owed().empty() ? now + kSleepNs : std::min(now + kSleepNs, look_at);
    if (nap(ready, std::min(deadline_ns, nap_end))) {
      pacer_.answered_asleep(now_ns() - start);
      return Status::kOk;
    }
    now = now_ns();
  }
}

}  // namespace xds::xccl
