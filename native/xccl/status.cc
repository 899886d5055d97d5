#include "status.h"

namespace xds::xccl {

const char* describe(Status status) {
  switch (status) {
    case Status::kOk:
      return "ok";
    case Status::kPending:
      return "not finished yet";
    case Status::kTimeout:
      return "the deadline passed";
    case Status::kPeerLost:
      return "a peer that owes an answer is dead or frozen";
    case Status::kBadRank:
      return "the rank is out of range or not attached";
    case Status::kTooLarge:
      return "the message does not fit";
    case Status::kBadArgument:
      return "an offset, alignment or shape is out of range";
    case Status::kBusy:
      return "an earlier operation is not finished, or another thread uses this port";
    case Status::kCorrupt:
      return "a peer's header contradicts the layout of the run";
    case Status::kStale:
      return "addressed to an incarnation that is gone";
  }
  return "unknown status";
}

}  // namespace xds::xccl
