#include "server.h"

namespace xds::xccl {

Server::Server(Core& core, Trace& trace) : core_(core), trace_(trace) {
  const LayoutParams& params = core.params();
  slots_.resize(size_t{params.max_ranks} * params.row_slots);
  taken_.assign(params.max_ranks, 0);
}

void Server::reset(uint32_t rank) {
  const uint32_t count = core_.params().row_slots;
  for (uint32_t i = 0; i < count; ++i) {
    Slot& place = slots_[size_t{rank} * count + i];
    if (place.seq != 0) --num_open_;
    place = {};
  }
  taken_[rank] = 0;
}

const RequestHeader* Server::next(uint32_t rank) const {
  if (!core_.is_attached(rank)) return nullptr;
  const uint64_t seq = taken_[rank] + 1;
  const RequestHeader& header = core_.peer(rank).segment->request(core_.rank(), seq);
  if (!core_.is_linked(rank) || load_acquire(header.seq) != seq) return nullptr;
  return &header;
}

bool Server::has_arrivals() const {
  for (uint32_t rank = 0; rank < taken_.size(); ++rank) {
    if (next(rank) != nullptr) return true;
  }
  return false;
}

bool Server::take(Incoming& incoming) {
  const auto ranks = static_cast<uint32_t>(taken_.size());
  for (uint32_t i = 0; i < ranks; ++i) {
    const uint32_t rank = (turn_ + i) % ranks;
    while (const RequestHeader* header = next(rank)) {
      ++taken_[rank];
      fault_point(FaultPoint::kTaken);
      if (!open(rank, *header, incoming)) continue;
      turn_ = rank + 1;
      return true;
    }
  }
  return false;
}

// False when the request was answered on the spot: abandoned by its asker, or impossible.
bool Server::open(uint32_t rank, const RequestHeader& header, Incoming& incoming) {
  const uint64_t seq = taken_[rank];
  const Peer& peer = core_.peer(rank);
  const bool is_known = is_row_type(header.row_type);
  const auto type = is_known ? static_cast<RowType>(header.row_type) : RowType::kBytes;
  const RowPlaces places(header.num_meta, header.num_rows, header.row_bytes, type);
  const uint64_t base = peer.segment->request_offset(core_.rank(), seq);
  incoming = {.source_rank = rank,
              .source_incarnation = peer.incarnation,
              .seq = seq,
              .tag = header.tag,
              .kind = header.kind,
              .row_type = type,
              .num_rows = header.num_rows,
              .row_bytes = header.row_bytes,
              .num_meta = header.num_meta,
              .reply_rows = header.reply_rows,
              .meta_offset = base,
              .scales_offset = base + places.scales,
              .rows_offset = base + places.rows};
  slots_[core_.layout().row_index(rank, seq)] = {
      .seq = seq, .tag = header.tag, .bytes = places.total, .sent_ns = header.sent_ns,
      .seen_ns = trace_.stamp()};
  ++num_open_;
  const bool is_wanted = load_relaxed(header.cancel) != seq;
  const bool is_sound = is_known && places.total <= core_.params().request_bytes &&
                        header.source_incarnation == peer.incarnation &&
                        header.source_rank == rank;
  if (is_wanted && is_sound) return true;
  num_cancelled_ += is_wanted ? 0 : 1;
  Answer answer;
  answer.code = is_wanted ? ReplyCode::kRefused : ReplyCode::kCancelled;
  answer.detail = is_wanted ? kLyingHeader : 0;
  publish(rank, peer.incarnation, seq, answer);
  return false;
}

Status Server::check_open(uint32_t to, uint64_t incarnation, uint64_t seq) const {
  if (!core_.is_attached(to)) return Status::kBadRank;
  if (core_.peer(to).incarnation != incarnation) return Status::kStale;
  return slot(to, seq).seq == seq ? Status::kOk : Status::kBadArgument;
}

Status Server::place(uint32_t to, uint64_t incarnation, uint64_t seq, const Answer& answer,
                     uint64_t& scales_offset, uint64_t& rows_offset) const {
  if (const Status status = check_open(to, incarnation, seq); status != Status::kOk) return status;
  const RowPlaces places(0, answer.num_rows, answer.row_bytes, answer.row_type);
  if (places.total > core_.params().reply_bytes) return Status::kTooLarge;
  const uint64_t base = core_.own().reply_offset(to, seq);
  scales_offset = base + places.scales;
  rows_offset = base + places.rows;
  return Status::kOk;
}

Status Server::publish(uint32_t to, uint64_t incarnation, uint64_t seq, const Answer& answer) {
  if (const Status status = check_open(to, incarnation, seq); status != Status::kOk) return status;
  const RowPlaces places(0, answer.num_rows, answer.row_bytes, answer.row_type);
  if (places.total > core_.params().reply_bytes) return Status::kTooLarge;
  Slot& place = slots_[core_.layout().row_index(to, seq)];
  ReplyHeader& header = core_.own().reply(to, seq);
  header.tag = place.tag;
  header.source_incarnation = core_.incarnation();
  header.target_incarnation = incarnation;
  header.code = static_cast<uint16_t>(answer.code);
  header.row_type = static_cast<uint16_t>(answer.row_type);
  header.num_rows = answer.num_rows;
  header.row_bytes = answer.row_bytes;
  header.detail = answer.detail;
  header.sent_ns = trace_.stamp();
  fault_point(FaultPoint::kReplyCopied);
  store_release(header.seq, seq);
  fault_point(FaultPoint::kReplyPublished);
  if (trace_.is_open()) {
    trace_.add({TraceKind::kServe, to, place.tag.step_idx, place.tag.layer_idx,
                place.tag.microbatch_idx, place.bytes, place.sent_ns, place.seen_ns, now_ns()});
  }
  place.seq = 0;
  --num_open_;
  core_.wake(to);
  return Status::kOk;
}

}  // namespace xds::xccl
