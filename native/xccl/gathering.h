// The requests of one exchange from every rank of a group: what a collective step waits for. A rank may
// be a step ahead of this one, so what comes early is kept.
//
//   request:  taken --tag asked for--> handed out
//                |
//                +--another tag--> kept --its tag asked for--> handed out
//                +--an epoch that was left, or from outside of the group--> refused
//                +--its asker has a new life--> dropped
//
// What is kept is bounded: an asker has row_slots requests under way, and no more.
#pragma once

#include <span>
#include <vector>

#include "core.h"
#include "server.h"

namespace xds::xccl {

class Gathering {
 public:
  static constexpr uint32_t kStaleEpoch = 0xFFFFFF02;  // details of refusals
  static constexpr uint32_t kNoMember = 0xFFFFFF03;

  // `ranks` ascend and are attached or will be.
  Gathering(Core& core, Server& server, std::vector<uint32_t> ranks);

  // What was asked in earlier epochs and not handed out is refused from now on.
  void enter(uint32_t epoch);
  // Takes what has arrived; true when every rank's request of `tag` is here.
  bool take(const Tag& tag);
  std::span<const uint32_t> missing(const Tag& tag);
  // Appends the requests of `tag` in the order of ranks, and forgets them.
  void hand_out(const Tag& tag, std::vector<Incoming>& out);

 private:
  bool is_current(const Incoming& request) {
    return core_.peer(request.source_rank).incarnation == request.source_incarnation;
  }
  void refuse(const Incoming& request, uint32_t detail);
  void drop_past_lives();
  const Incoming* find(uint32_t rank, const Tag& tag) const;

  Core& core_;
  Server& server_;
  std::vector<uint32_t> ranks_;
  std::vector<Incoming> kept_;
  uint32_t epoch_ = 0;
  std::vector<uint32_t> missing_;  // scratch
};

}  // namespace xds::xccl
