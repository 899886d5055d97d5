#include "asker.h"

#include <cstring>

namespace xds::xccl {

Asker::Asker(Core& core, Trace& trace) : core_(core), trace_(trace) {
  const LayoutParams& params = core.params();
  slots_.resize(size_t{params.max_ranks} * params.row_slots);
  last_seq_.assign(params.max_ranks, 0);
}

void Asker::reset(uint32_t rank) {
  const uint32_t count = core_.params().row_slots;
  for (uint32_t i = 0; i < count; ++i) slots_[size_t{rank} * count + i] = {};
  last_seq_[rank] = 0;
}

// True when the slot of `seq` is free, after dropping a late reply that frees it.
bool Asker::reclaim(uint32_t rank, uint64_t seq) {
  Slot& place = slot(rank, seq);
  if (place.use == Use::kAbandoned) {
    const ReplyHeader* late = nullptr;
    if (reply(rank, seq - core_.params().row_slots, late) == Status::kPending) return false;
    place.use = Use::kFree;
    ++num_late_;
  }
  return place.use == Use::kFree;
}

Status Asker::post(uint32_t to, const RowSource& source, const Request& request, uint64_t& seq) {
  if (!core_.is_attached(to)) return Status::kBadRank;
  const RowPlaces places(request.num_meta, request.num_rows, source.sent_row_bytes(),
                         source.sent_type());
  if (places.total > core_.params().request_bytes) return Status::kTooLarge;
  const uint64_t next = last_seq_[to] + 1;
  if (!reclaim(to, next)) return Status::kPending;
  Slot& place = slot(to, next);
  place = {.use = Use::kWaiting, .enqueue_ns = trace_.stamp(), .bytes = places.total};

  uint8_t* data = core_.own().base() + core_.own().request_offset(to, next);
  if (request.num_meta > 0) std::memcpy(data, request.meta, uint64_t{request.num_meta} * 4);
  copy_rows(source, request.row_idx, request.num_rows,
            reinterpret_cast<float*>(data + places.scales), data + places.rows);
  RequestHeader& header = core_.own().request(to, next);
  header.tag = request.tag;
  header.source_incarnation = core_.incarnation();
  header.source_rank = core_.rank();
  header.kind = request.kind;
  header.row_type = static_cast<uint16_t>(source.sent_type());
  header.num_rows = request.num_rows;
  header.row_bytes = source.sent_row_bytes();
  header.num_meta = request.num_meta;
  header.reply_rows = request.reply_rows;
  header.sent_ns = place.visible_ns = trace_.stamp();
  fault_point(FaultPoint::kPostCopied);
  store_release(header.seq, next);
  fault_point(FaultPoint::kPostPublished);
  last_seq_[to] = seq = next;
  core_.wake(to);
  return Status::kOk;
}

Status Asker::reply(uint32_t from, uint64_t seq, const ReplyHeader*& out) const {
  const ReplyHeader& header = core_.peer(from).segment->reply(core_.rank(), seq);
  if (!core_.is_linked(from) || load_acquire(header.seq) != seq) return Status::kPending;
  fault_point(FaultPoint::kReplySeen);
  out = &header;
  if (header.target_incarnation != core_.incarnation() || !is_row_type(header.row_type)) {
    return Status::kCorrupt;
  }
  const RowPlaces places(0, header.num_rows, header.row_bytes,
                         static_cast<RowType>(header.row_type));
  return places.total <= core_.params().reply_bytes ? Status::kOk : Status::kCorrupt;
}

void Asker::finish(uint32_t from, uint64_t seq) {
  Slot& place = slot(from, seq);
  if (trace_.is_open()) {
    const Tag& tag = core_.own().request(from, seq).tag;
    trace_.add({TraceKind::kRequest, from, tag.step_idx, tag.layer_idx, tag.microbatch_idx,
                place.bytes, place.enqueue_ns, place.visible_ns, now_ns()});
  }
  place.use = Use::kFree;
}

void Asker::abandon(uint32_t from, uint64_t seq) {
  slot(from, seq).use = Use::kAbandoned;
  store_release(core_.own().request(from, seq).cancel, seq);
}

uint32_t Asker::num_open(uint32_t rank) const {
  const uint32_t count = core_.params().row_slots;
  uint32_t open = 0;
  for (uint32_t i = 0; i < count; ++i) open += slots_[size_t{rank} * count + i].use != Use::kFree;
  return open;
}

}  // namespace xds::xccl
