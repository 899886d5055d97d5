// Who gets which rows: the planning half of Exchange.
#include <algorithm>

#include "exchange.h"

namespace xds::xccl {

bool Exchange::add_routed(const Pairs& pairs, std::span<const int32_t> expert_rank,
                          const Tag& tag, uint16_t kind, std::span<const uint32_t> also) {
  pairs_ = pairs;
  slots_.clear();
  for (uint32_t slot = 0; slot < pairs.num_slots; ++slot) {
    if (pairs.experts[slot] == -1) continue;
    if (row_of(static_cast<int32_t>(slot)) >= source_.num_rows) return false;
    slots_.push_back(static_cast<int32_t>(slot));
  }
  return plan(slots_, expert_rank, tag, kind, also);
}

// Counts the pairs of each expert; false when one does not exist or lives nowhere.
bool Exchange::count_pairs(std::span<const int32_t> slots, std::span<const int32_t> expert_rank) {
  expert_count_.assign(expert_rank.size(), 0);
  for (const int32_t slot : slots) {
    const int32_t expert = pairs_.experts[slot];
    if (expert < 0 || static_cast<size_t>(expert) >= expert_rank.size()) return false;
    const int32_t rank = expert_rank[expert];
    if (rank < 0 || static_cast<uint32_t>(rank) >= core_.params().max_ranks) return false;
    ++expert_count_[expert];
  }
  return true;
}

// Counting sort by (rank, expert), stable in slot; parts are planned rank by rank.
bool Exchange::plan(std::span<const int32_t> slots, std::span<const int32_t> expert_rank,
                    const Tag& tag, uint16_t kind, std::span<const uint32_t> also) {
  if (!count_pairs(slots, expert_rank)) return false;
  expert_next_.assign(expert_rank.size(), 0);
  const auto first = static_cast<uint32_t>(pair_slot_.size());
  std::vector<uint32_t>& starts = starts_;  // first pair of each rank, then the end
  starts.assign(core_.params().max_ranks + 1, 0);
  for (size_t e = 0; e < expert_rank.size(); ++e) {
    if (expert_count_[e] > 0) starts[expert_rank[e] + 1] += expert_count_[e];
  }
  for (size_t r = 1; r < starts.size(); ++r) starts[r] += starts[r - 1];
  cursor_.assign(starts.begin(), starts.end());
  for (size_t e = 0; e < expert_rank.size(); ++e) {
    if (expert_count_[e] == 0) continue;
    expert_next_[e] = first + cursor_[expert_rank[e]];
    cursor_[expert_rank[e]] += expert_count_[e];
  }
  pair_slot_.resize(first + slots.size());
  for (const int32_t slot : slots) pair_slot_[expert_next_[pairs_.experts[slot]]++] = slot;
  for (uint32_t rank = 0; rank + 1 < starts.size(); ++rank) {
    const uint32_t count = starts[rank + 1] - starts[rank];
    const bool is_asked = std::find(also.begin(), also.end(), rank) != also.end();
    if (count > 0 || is_asked) plan_part(rank, first + starts[rank], count, tag, kind);
  }
  return true;
}

void Exchange::plan_part(uint32_t rank, uint32_t first_pair, uint32_t num_pairs, const Tag& tag,
                         uint16_t kind) {
  Part part{.rank = rank, .tag = tag, .kind = kind};
  part.first_pair = first_pair;
  part.num_pairs = num_pairs;
  part.first_row = static_cast<uint32_t>(row_idx_.size());
  metas_.push_back({static_cast<uint32_t>(meta_.size()), num_pairs * 2, num_pairs});
  local_row_.resize(std::max<size_t>(local_row_.size(), source_.num_rows), -1);
  for (uint32_t i = first_pair; i < first_pair + num_pairs; ++i) {
    const uint32_t row = row_of(pair_slot_[i]);
    if (local_row_[row] < 0) {
      local_row_[row] = static_cast<int32_t>(row_idx_.size() - part.first_row);
      row_idx_.push_back(static_cast<int32_t>(row));
    }
    meta_.push_back(local_row_[row]);
    meta_.push_back(pairs_.experts[pair_slot_[i]]);
  }
  part.num_rows = static_cast<uint32_t>(row_idx_.size()) - part.first_row;
  for (size_t i = part.first_row; i < row_idx_.size(); ++i) local_row_[row_idx_[i]] = -1;
  parts_.push_back(part);
}

bool Exchange::reroute(std::span<const uint32_t> ranks, std::span<const int32_t> expert_rank,
                       const Tag& tag) {
  slots_.clear();
  const auto is_affected = [&](const Part& part) {
    return std::find(ranks.begin(), ranks.end(), part.rank) != ranks.end() &&
           part.state != PartState::kAnswered && part.state != PartState::kMoved &&
           part.num_pairs > 0;
  };
  uint16_t kind = 0;
  for (const Part& part : parts_) {
    if (!is_affected(part)) continue;
    const auto pairs = pair_slots(part);
    slots_.insert(slots_.end(), pairs.begin(), pairs.end());
    kind = part.kind;
  }
  std::sort(slots_.begin(), slots_.end());
  if (!count_pairs(slots_, expert_rank)) return false;
  for (Part& part : parts_) {
    if (is_affected(part)) give_up(part, PartState::kMoved);
  }
  return plan(slots_, expert_rank, tag, kind, {});
}

bool Exchange::resend(uint32_t from, uint32_t to, const Tag& tag) {
  bool found = false;
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& old = parts_[i];
    const bool is_open = old.state != PartState::kAnswered && old.state != PartState::kMoved;
    if (old.rank != from || old.num_pairs > 0 || !is_open || old.tag == tag) continue;
    Part fresh{.rank = to, .tag = tag, .kind = old.kind};
    fresh.first_row = old.first_row;
    fresh.num_rows = old.num_rows;
    give_up(old, PartState::kMoved);
    metas_.push_back(MetaRange(metas_[i]));
    parts_.push_back(fresh);
    found = true;
  }
  return found;
}

}  // namespace xds::xccl
