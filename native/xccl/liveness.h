// Who is alive. A peer is dead when its process is gone (or is a zombie, or has another start time:
// its pid was given to somebody else), or when it closed its segment. It is frozen when its heartbeat
// stood still for `frozen_after` of *our* observed time: what we slept through ourselves (stopped,
// suspended) does not count against a peer.
//
//   ABSENT --attach--> ALIVE <--heartbeat stands still / moves--> FROZEN
//                        |                                          |
//                        +---- process gone, segment closed ------> DEAD --attach new life--> ALIVE
#pragma once

#include <cstdint>

#include "segment.h"

namespace xds::xccl {

enum class PeerState : uint32_t { kAbsent = 0, kAlive = 1, kFrozen = 2, kDead = 3 };

// Start time of a process in clock ticks since boot; 0 when it does not run (gone or zombie).
// Reads /proc: the ranks of a run share a pid namespace.
uint64_t process_start(int32_t pid);

// What one rank knows of the life of another.
class Pulse {
 public:
  void reset(int64_t now);
  void ask_afresh() { process_ns_ = 0; }
  // Looks at heartbeat and process; the process at most once per 10 ms, unless asked afresh.
  PeerState look(const Segment& segment, int64_t now, int64_t frozen_after_ns);

  PeerState state() const { return state_; }
  int64_t silence_ns() const { return silence_ns_; }
  int64_t looked_ns() const { return looked_ns_; }  // when the latest look was

 private:
  PeerState state_ = PeerState::kAbsent;
  uint64_t heartbeat_ = 0;
  int64_t looked_ns_ = 0;
  int64_t process_ns_ = 0;
  int64_t silence_ns_ = 0;
};

}  // namespace xds::xccl
