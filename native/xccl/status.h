// What a primitive of the hot path returns. Numbered by area; the binding turns each into a typed
// Python error once.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace xds::xccl {

enum class Status : int32_t {
  kOk = 0,
  // 100: waiting
  kPending = 100,   // not yet; ask again
  kTimeout = 101,   // the deadline passed
  kPeerLost = 102,  // a peer that owes an answer is dead or frozen
  // 200: arguments
  kBadRank = 200,      // no such rank, or not attached
  kTooLarge = 201,     // the message does not fit the slot or the buffer
  kBadArgument = 202,  // offset, alignment or shape
  kBusy = 203,         // an earlier operation on this pair is not finished, or another thread is in
  // 300: protocol
  kCorrupt = 300,  // a peer's header contradicts the layout
  kStale = 301,    // addressed to an incarnation that is gone; dropped
};

const char* describe(Status status);

// A segment cannot be created, opened or verified. Never thrown on the hot path.
class SegmentFault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace xds::xccl
