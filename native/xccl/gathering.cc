#include "gathering.h"

#include <algorithm>

namespace xds::xccl {

Gathering::Gathering(Core& core, Server& server, std::vector<uint32_t> ranks)
    : core_(core), server_(server), ranks_(std::move(ranks)) {}

void Gathering::enter(uint32_t epoch) {
  if (epoch <= epoch_) return;
  epoch_ = epoch;
  std::erase_if(kept_, [&](const Incoming& request) {
    const bool is_stale = request.tag.epoch < epoch;
    if (is_stale) refuse(request, kStaleEpoch);
    return is_stale;
  });
}

bool Gathering::take(const Tag& tag) {
  drop_past_lives();
  Incoming request;
  while (server_.take(request)) {
    if (!std::binary_search(ranks_.begin(), ranks_.end(), request.source_rank)) {
      refuse(request, kNoMember);
    } else if (request.tag.epoch < epoch_) {
      refuse(request, kStaleEpoch);
    } else {
      kept_.push_back(request);
    }
  }
  return kept_.size() >= ranks_.size() && missing(tag).empty();
}

void Gathering::refuse(const Incoming& request, uint32_t detail) {
  server_.publish(request.source_rank, request.source_incarnation, request.seq,
                  {.code = ReplyCode::kRefused, .detail = detail});
}

void Gathering::drop_past_lives() {
  std::erase_if(kept_, [this](const Incoming& request) { return !is_current(request); });
}

const Incoming* Gathering::find(uint32_t rank, const Tag& tag) const {
  const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Incoming& request) {
    return request.source_rank == rank && request.tag == tag;
  });
  return found == kept_.end() ? nullptr : &*found;
}

std::span<const uint32_t> Gathering::missing(const Tag& tag) {
  missing_.clear();
  for (const uint32_t rank : ranks_) {
    if (find(rank, tag) == nullptr) missing_.push_back(rank);
  }
  return missing_;
}

void Gathering::hand_out(const Tag& tag, std::vector<Incoming>& out) {
  for (const uint32_t rank : ranks_) {
    if (const Incoming* found = find(rank, tag)) out.push_back(*found);
  }
  std::erase_if(kept_, [&](const Incoming& request) { return request.tag == tag; });
}

}  // namespace xds::xccl
