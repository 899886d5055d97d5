#include "p2p.h"

#include <algorithm>

#include "copy.h"

namespace xds::xccl {

P2p::P2p(Core& core, Trace& trace) : core_(core), trace_(trace) {
  const uint32_t ranks = core.params().max_ranks;
  sends_.resize(ranks);
  sent_.assign(ranks, 0);
  received_.assign(ranks, 0);
  lent_.assign(ranks, 0);
}

void P2p::reset(uint32_t rank) {
  abandon_send(rank);
  sent_[rank] = received_[rank] = 0;
  lent_[rank] = 0;
}

Status P2p::begin_send(uint32_t to, const uint8_t* data, uint64_t bytes, uint32_t tag) {
  if (!core_.is_attached(to)) return Status::kBadRank;
  SendState& send = sends_[to];
  if (send.is_active) return Status::kBusy;
  const uint32_t slot_bytes = core_.params().p2p_slot_bytes;
  const uint64_t num_chunks = bytes == 0 ? 1 : (bytes - 1) / chunk_bytes(bytes, slot_bytes) + 1;
  if (num_chunks > UINT32_MAX) return Status::kTooLarge;
  send = {.data = data,
          .total = bytes,
          .num_chunks = static_cast<uint32_t>(num_chunks),
          .tag = tag,
          .is_active = true,
          .serial = send.serial + 1,
          .enqueue_ns = trace_.stamp()};
  ++num_active_;
  return Status::kOk;
}

void P2p::abandon_send(uint32_t to) {
  if (sends_[to].is_active) --num_active_;
  sends_[to].is_active = false;
}

// Chunks in the ring that the receiver has not taken.
uint64_t P2p::credits_used(uint32_t to) const {
  if (!core_.is_linked(to)) return sent_[to];  // it has not seen this session: nothing taken
  const Segment& theirs = *core_.peer(to).segment;
  return sent_[to] - load_acquire(theirs.link(core_.rank()).p2p_received);
}

void P2p::publish_chunk(uint32_t to, SendState& send) {
  const uint32_t slot_bytes = core_.params().p2p_slot_bytes;
  const uint64_t event = sent_[to] + 1;
  const auto bytes = static_cast<uint32_t>(
      std::min(chunk_bytes(send.total, slot_bytes), send.total - send.done));
  ChunkMeta& meta = core_.own().chunk(to, event);
  const bool is_inline = send.num_chunks == 1 && bytes <= kInlineBytes;
  uint8_t* place = is_inline ? meta.payload : core_.own().chunk_data(to, event);
  copy_bytes(place, send.data + send.done, bytes, send.total);
  meta.chunk_idx = send.chunk_idx;
  meta.num_chunks = send.num_chunks;
  meta.bytes = bytes;
  meta.tag = send.tag;
  meta.total_bytes = send.total;
  fault_point(FaultPoint::kSendCopied);
  store_release(meta.event, event);
  fault_point(FaultPoint::kSendPublished);
  sent_[to] = event;
  send.done += bytes;
  ++send.chunk_idx;
  core_.wake(to);
}

Status P2p::push(uint32_t to) {
  SendState& send = sends_[to];
  if (!send.is_active) return Status::kOk;
  while (send.chunk_idx < send.num_chunks) {
    if (credits_left(to) == 0) return Status::kPending;
    publish_chunk(to, send);
  }
  abandon_send(to);
  if (trace_.is_open()) {
    const int64_t now = now_ns();
    trace_.add({TraceKind::kSend, to, send.tag, 0, 0, send.total, send.enqueue_ns, now, now});
  }
  return Status::kOk;
}

void P2p::push_all() {
  if (num_active_ == 0) return;
  for (uint32_t rank = 0; rank < sends_.size(); ++rank) {
    if (sends_[rank].is_active) push(rank);
  }
}

uint64_t P2p::pushable_bytes() const {
  uint64_t bytes = 0;
  for (uint32_t rank = 0; rank < sends_.size() && num_active_ > 0; ++rank) {
    const SendState& send = sends_[rank];
    if (!send.is_active) continue;
    bytes += std::min(send.total - send.done, credits_left(rank) * core_.params().p2p_slot_bytes);
  }
  return bytes;
}

uint64_t P2p::pullable_bytes(uint32_t from) const {
  const ChunkMeta* meta = next_chunk(from);
  return meta == nullptr ? 0 : meta->total_bytes;
}

Status P2p::is_drained(uint32_t to) {
  const Status status = push(to);
  if (status != Status::kOk) return status;
  return credits_used(to) == 0 ? Status::kOk : Status::kPending;
}

const ChunkMeta* P2p::next_chunk(uint32_t from) const {
  const uint64_t event = received_[from] + 1;
  const ChunkMeta& meta = core_.peer(from).segment->chunk(core_.rank(), event);
  if (!core_.is_linked(from) || load_acquire(meta.event) != event) return nullptr;
  return &meta;
}

Status P2p::check(const ChunkMeta& meta, const RecvState& state) const {
  const uint64_t left = meta.total_bytes - state.done;
  const uint64_t expected =
      std::min(chunk_bytes(meta.total_bytes, core_.params().p2p_slot_bytes), left);
  const bool continues = state.chunk_idx == 0 || meta.total_bytes == state.total;
  const bool is_last = meta.chunk_idx + 1 == meta.num_chunks;
  const bool good = meta.chunk_idx == state.chunk_idx && meta.chunk_idx < meta.num_chunks &&
                    state.done <= meta.total_bytes && meta.bytes == expected && continues &&
                    is_last == (meta.bytes == left);
  return good ? Status::kOk : Status::kCorrupt;
}

void P2p::acknowledge(uint32_t from) {
  fault_point(FaultPoint::kRecvCopied);
  store_release(core_.own().link(from).p2p_received, ++received_[from]);
  fault_point(FaultPoint::kRecvAcked);
  core_.wake(from);
}

Status P2p::pull(uint32_t from, uint8_t* out, uint64_t capacity, RecvState& state) {
  if (lent_[from] != 0) return Status::kBusy;
  for (;;) {
    const ChunkMeta* meta = next_chunk(from);
    if (meta == nullptr) return Status::kPending;
    if (meta->chunk_idx == 0 && state.chunk_idx != 0) {  // the sender gave the old message up
      state = {.enqueue_ns = state.enqueue_ns};
    } else if (meta->chunk_idx != 0 && state.chunk_idx == 0) {  // rest of one given up here
      acknowledge(from);
      continue;
    }
    if (const Status status = check(*meta, state); status != Status::kOk) return status;
    if (state.chunk_idx == 0) {
      state.total = meta->total_bytes;
      state.tag = meta->tag;
      state.visible_ns = trace_.stamp();
      if (state.total > capacity) return Status::kTooLarge;
    }
    const bool is_inline = meta->num_chunks == 1 && meta->bytes <= kInlineBytes;
    const uint8_t* place =
        is_inline ? meta->payload
                  : core_.peer(from).segment->chunk_data(core_.rank(), received_[from] + 1);
    copy_bytes(out + state.done, place, meta->bytes, state.total);
    state.done += meta->bytes;
    ++state.chunk_idx;
    const bool is_last = state.done == state.total;
    acknowledge(from);
    if (!is_last) continue;
    if (trace_.is_open()) {
      trace_.add({TraceKind::kRecv, from, state.tag, 0, 0, state.total, state.enqueue_ns,
                  state.visible_ns, now_ns()});
    }
    return Status::kOk;
  }
}

Status P2p::lend(uint32_t from, ChunkView& view) {
  if (lent_[from] != 0) return Status::kBusy;
  const ChunkMeta* meta = next_chunk(from);
  if (meta == nullptr) return Status::kPending;
  if (meta->bytes > core_.params().p2p_slot_bytes || meta->chunk_idx >= meta->num_chunks) {
    return Status::kCorrupt;
  }
  const bool is_inline = meta->num_chunks == 1 && meta->bytes <= kInlineBytes;
  const Segment& theirs = *core_.peer(from).segment;
  view = {.data = is_inline ? meta->payload
                            : theirs.chunk_data(core_.rank(), received_[from] + 1),
          .bytes = meta->bytes,
          .chunk_idx = meta->chunk_idx,
          .num_chunks = meta->num_chunks,
          .tag = meta->tag,
          .total_bytes = meta->total_bytes};
  lent_[from] = 1;
  return Status::kOk;
}

Status P2p::give_back(uint32_t from) {
  if (lent_[from] == 0) return Status::kBadArgument;
  lent_[from] = 0;
  acknowledge(from);
  return Status::kOk;
}

}  // namespace xds::xccl
