#include "core.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace xds::xccl {

void futex_wait(uint32_t& word, uint32_t seen, int64_t until_ns) {
  timespec until{until_ns / 1'000'000'000, until_ns % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, seen, &until, nullptr, FUTEX_BITSET_MATCH_ANY);
}

void Core::ring(const Segment& segment) {
  uint32_t& word = segment.doorbell().word;
  std::atomic_ref<uint32_t>(word).fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

Core::Core(std::shared_ptr<Segment> own, int64_t frozen_after_ns)
    : own_(std::move(own)), peers_(params().max_ranks), frozen_after_ns_(frozen_after_ns) {
  beat();
}

void Core::attach(std::shared_ptr<Segment> segment) {
  const SegmentHeader& theirs = segment->header();
  const SegmentHeader& ours = own_->header();
  if (std::string(theirs.run_id) != ours.run_id) {
    throw SegmentFault(std::string("segment of run '") + theirs.run_id + "', this rank is in '" +
                       ours.run_id + "'");
  }
  if (theirs.params != ours.params) {
    throw SegmentFault(std::string("rank '") + theirs.name +
                       "' has another layout: give all ranks of a run the same Layout");
  }
  const uint32_t rank = theirs.rank;
  if (rank == ours.rank && theirs.incarnation != ours.incarnation) {
    throw SegmentFault("rank " + std::to_string(rank) + " is this rank; '" + theirs.name +
                       "' claims it too");
  }
  Peer& peer = peers_[rank];
  if (theirs.incarnation == peer.incarnation) return;
  if (theirs.incarnation < peer.incarnation) {
    throw SegmentFault(std::string("the blob of '") + theirs.name +
                       "' is of an older incarnation than the attached one");
  }
  wipe_session(rank);
  peer.segment = std::move(segment);
  peer.incarnation = peer.segment->header().incarnation;
  peer.pulse.reset(now_ns());
  fault_point(FaultPoint::kLinkReset);
  store_release(own_->link(rank).peer_incarnation, peer.incarnation);
  wake(rank);
}

void Core::wipe_session(uint32_t rank) {
  LinkLine& link = own_->link(rank);
  store_release(link.peer_incarnation, uint64_t{0});
  full_fence();
  store_relaxed(link.p2p_received, uint64_t{0});
  for (uint32_t i = 0; i < params().p2p_slots; ++i) {
    store_relaxed(own_->chunk(rank, i).event, uint64_t{0});
  }
  for (uint32_t i = 0; i < params().row_slots; ++i) {
    store_relaxed(own_->request(rank, i).seq, uint64_t{0});
    store_relaxed(own_->request(rank, i).cancel, uint64_t{0});
    store_relaxed(own_->reply(rank, i).seq, uint64_t{0});
  }
}

PeerState Core::look(uint32_t rank) {
  if (!is_attached(rank)) return PeerState::kAbsent;
  Peer& peer = peers_[rank];
  return peer.pulse.look(*peer.segment, now_ns(), frozen_after_ns_);
}

// A rank that was found lost is always looked at again: it may have thawed.
bool Core::someone_lost(std::span<const uint32_t> owed, int64_t now) {
  bool lost = false;
  for (const uint32_t rank : owed) {
    const Pulse& pulse = peers_[rank].pulse;
    const bool is_due =
        pulse.state() != PeerState::kAlive || now - pulse.looked_ns() >= kLookEveryNs;
    lost |= is_due && look(rank) != PeerState::kAlive;
  }
  return lost;
}

}  // namespace xds::xccl
