#include "exchange.h"

#include <algorithm>

#include "server.h"

namespace xds::xccl {

void Exchange::begin(const RowSource& source) {
  release();
  source_ = source;
  pairs_ = {};
}

void Exchange::add_rows(uint32_t rank, const Tag& tag, uint16_t kind,
                        std::span<const int32_t> row_idx, std::span<const int32_t> meta,
                        uint32_t reply_rows) {
  Part part{.rank = rank, .tag = tag, .kind = kind};
  part.first_row = static_cast<uint32_t>(row_idx_.size());
  part.num_rows = row_idx.empty() ? source_.num_rows : static_cast<uint32_t>(row_idx.size());
  metas_.push_back({static_cast<uint32_t>(meta_.size()), static_cast<uint32_t>(meta.size()),
                    reply_rows});
  if (row_idx.empty()) {
    for (uint32_t i = 0; i < source_.num_rows; ++i) row_idx_.push_back(static_cast<int32_t>(i));
  }
  row_idx_.insert(row_idx_.end(), row_idx.begin(), row_idx.end());
  meta_.insert(meta_.end(), meta.begin(), meta.end());
  parts_.push_back(part);
}

Status Exchange::post_part(Part& part) {
  const MetaRange& range = metas_[&part - parts_.data()];
  Request request{.tag = part.tag,
                  .kind = part.kind,
                  .row_idx = row_idx_.data() + part.first_row,
                  .num_rows = part.num_rows,
                  .meta = meta_.data() + range.first,
                  .num_meta = range.count,
                  .reply_rows = range.reply_rows};
  const Status status = asker_.post(part.rank, source_, request, part.seq);
  if (status == Status::kOk) {
    part.state = PartState::kWaiting;
    part.incarnation = core_.peer(part.rank).incarnation;
  }
  return status;
}

Status Exchange::post() {
  Status result = Status::kOk;
  for (Part& part : parts_) {
    if (part.state != PartState::kPlanned) continue;
    if (!core_.is_attached(part.rank) || core_.is_gone(part.rank)) {
      part.state = PartState::kLost;
      continue;
    }
    const Status status = post_part(part);
    if (status != Status::kOk && result != Status::kTooLarge) result = status;
  }
  return result;
}

bool Exchange::collect() {
  bool complete = true;
  for (Part& part : parts_) {
    const bool is_sent = part.state == PartState::kWaiting || part.state == PartState::kAnswered;
    if (is_sent && core_.peer(part.rank).incarnation != part.incarnation) {
      part.state = PartState::kLost;  // an answer too: it lies in a segment that was replaced
    } else if (part.state == PartState::kWaiting) {
      if (const Status status = asker_.reply(part.rank, part.seq, part.reply);
          status != Status::kPending) {
        const bool is_answer = status == Status::kOk && part.reply->tag == part.tag &&
                               part.reply->code == static_cast<uint16_t>(ReplyCode::kAnswer);
        part.state = is_answer ? PartState::kAnswered : PartState::kRefused;
        part.detail = status == Status::kOk ? part.reply->detail : Server::kLyingHeader;
        if (!is_answer) asker_.finish(part.rank, part.seq);
      }
    }
    complete &= part.state == PartState::kAnswered || part.state == PartState::kRefused ||
                part.state == PartState::kMoved;
  }
  return complete;
}

template <class Owes>
std::span<const uint32_t> Exchange::ranks_of(Owes&& owes) {
  owing_.clear();
  for (const Part& part : parts_) {
    const bool is_new = std::find(owing_.begin(), owing_.end(), part.rank) == owing_.end();
    if (is_new && owes(part.state)) owing_.push_back(part.rank);
  }
  return owing_;
}

std::span<const uint32_t> Exchange::owing() {
  return ranks_of([](PartState state) {
    return state == PartState::kWaiting || state == PartState::kPlanned;
  });
}

std::span<const uint32_t> Exchange::blocking() {
  return ranks_of([](PartState state) { return state == PartState::kPlanned; });
}

uint64_t Exchange::planned_bytes() const {
  uint64_t num_rows = 0;
  for (const Part& part : parts_) num_rows += part.state == PartState::kPlanned ? part.num_rows : 0;
  return num_rows * source_.width * item_bytes(source_.type);
}

bool Exchange::has_lost() const {
  return std::any_of(parts_.begin(), parts_.end(),
                     [](const Part& part) { return part.state == PartState::kLost; });
}

void Exchange::mark_dead() {
  for (Part& part : parts_) {
    const bool owes = part.state == PartState::kWaiting || part.state == PartState::kPlanned;
    if (owes && core_.is_gone(part.rank)) give_up(part, PartState::kLost);
  }
}

void Exchange::give_up(Part& part, PartState state) {
  const bool is_same_life = core_.peer(part.rank).incarnation == part.incarnation;
  if (part.state == PartState::kWaiting && is_same_life) asker_.abandon(part.rank, part.seq);
  part.state = state;
}

bool Exchange::map_slots(uint32_t width, uint32_t num_slots) const {
  slot_row_.assign(num_slots, {nullptr, RowType::kBytes, 0.0f});
  for (const Part& part : parts_) {
    if (part.state == PartState::kMoved) continue;
    if (part.state != PartState::kAnswered) return false;
    if (core_.peer(part.rank).incarnation != part.incarnation) return false;
    if (part.num_pairs == 0) continue;
    const ReplyHeader& reply = *part.reply;
    const auto type = static_cast<RowType>(reply.row_type);
    if (reply.num_rows != part.num_pairs || type == RowType::kBytes ||
        reply.row_bytes != width * item_bytes(type)) {
      return false;
    }
    const Segment& theirs = *core_.peer(part.rank).segment;
    const uint8_t* base = theirs.base() + theirs.reply_offset(core_.rank(), part.seq);
    const RowPlaces places(0, reply.num_rows, reply.row_bytes, type);
    const auto* scales = reinterpret_cast<const float*>(base + places.scales);
    for (uint32_t i = 0; i < part.num_pairs; ++i) {
      const auto slot = static_cast<uint32_t>(pair_slot_[part.first_pair + i]);
      if (slot >= num_slots) return false;
      slot_row_[slot] = {base + places.rows + uint64_t{i} * reply.row_bytes, type,
                         type == RowType::kInt8 ? scales[i] : 1.0f};
    }
  }
  return true;
}

Status Exchange::gather(float* out, uint32_t width) const {
  if (!map_slots(width, pairs_.num_slots)) return Status::kBadArgument;
  for (uint64_t slot = 0; slot < slot_row_.size(); ++slot) {
    const RowView& row = slot_row_[slot];
    if (row.data != nullptr) read_row(row.data, row.type, row.scale, width, out + slot * width);
  }
  return Status::kOk;
}

Status Exchange::combine(const float* weights, float* out, uint32_t tokens,
                         uint32_t width) const {
  if (uint64_t{tokens} * pairs_.top_k != pairs_.num_slots) return Status::kBadArgument;
  if (!map_slots(width, pairs_.num_slots)) return Status::kBadArgument;
  for (uint32_t t = 0; t < tokens; ++t) {
    float* sum = out + uint64_t{t} * width;
    std::fill_n(sum, width, 0.0f);
    for (uint32_t slot = t * pairs_.top_k; slot < (t + 1) * pairs_.top_k; ++slot) {
      const RowView& row = slot_row_[slot];
      if (row.data != nullptr) add_row(weights[slot], row.data, row.type, row.scale, width, sum);
    }
  }
  return Status::kOk;
}

void Exchange::release() {
  for (Part& part : parts_) {
    const bool is_same_life = core_.is_attached(part.rank) &&
                              core_.peer(part.rank).incarnation == part.incarnation;
    if (!is_same_life) continue;
    if (part.state == PartState::kAnswered) asker_.finish(part.rank, part.seq);
    if (part.state == PartState::kWaiting) asker_.abandon(part.rank, part.seq);
  }
  parts_.clear();
  metas_.clear();
  row_idx_.clear();
  meta_.clear();
  pair_slot_.clear();
}

}  // namespace xds::xccl
