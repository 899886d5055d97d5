// Point-to-point messages: a ring of fixed slots per ordered pair, in the sender's segment.
//
//   sender                                   receiver
//   waits for a credit (p2p_received)
//   copies a chunk into slot n
//   stores event = n (release) ------------> sees event = n (acquire)
//   wakes the receiver if it sleeps          copies the chunk out (or lends a view)
//   next chunk, while credits last           stores p2p_received = n (release): the credit
//                                            wakes the sender if it sleeps
//
// The published protocol has the sender poll for the acknowledgement before it returns; here credits
// are counted, so chunks of one message and messages of one pair are in flight together. Messages of a
// pair arrive in order. One send and one receive per pair may be unfinished at a time.
//
// A send given up halfway (deadline) leaves its first chunks in the ring: chunk_idx going back to 0
// tells the receiver to start over. A receive given up halfway loses that message: the rest of it is
// skipped by the next receive.
#pragma once

#include <vector>

#include "core.h"
#include "trace.h"

namespace xds::xccl {

// Bytes of each chunk of a message but the last: both sides compute it. A message that fits a slot but
// is not small travels in four parts, so that the receiver copies one while the sender copies the next.
constexpr uint64_t chunk_bytes(uint64_t total, uint64_t slot_bytes) {
  constexpr uint64_t kParts = 4, kUnsplit = 16 << 10;
  const uint64_t part = total <= kUnsplit ? total : round_to_line((total + kParts - 1) / kParts);
  return part < slot_bytes ? part : slot_bytes;
}

struct SendState {
  const uint8_t* data = nullptr;
  uint64_t total = 0;
  uint64_t done = 0;
  uint32_t chunk_idx = 0;
  uint32_t num_chunks = 0;
  uint32_t tag = 0;
  bool is_active = false;
  uint64_t serial = 0;  // tells one send of a pair from the next
  int64_t enqueue_ns = 0;
};

struct RecvState {
  uint64_t done = 0;
  uint64_t total = 0;
  uint32_t chunk_idx = 0;
  uint32_t tag = 0;
  int64_t enqueue_ns = 0, visible_ns = 0;
};

// A chunk lent in place, until `release`.
struct ChunkView {
  const uint8_t* data;
  uint32_t bytes, chunk_idx, num_chunks, tag;
  uint64_t total_bytes;
};

class P2p {
 public:
  P2p(Core& core, Trace& trace);

  void reset(uint32_t rank);  // the peer has a new life: unfinished messages are forgotten

  // Starts a message; `data` stays valid and unchanged until it is sent. kBusy: the last one to this
  // rank is not finished.
  Status begin_send(uint32_t to, const uint8_t* data, uint64_t bytes, uint32_t tag);
  // Copies what credits allow. kOk: all of it is in the ring; kPending: more credits are needed.
  Status push(uint32_t to);
  bool is_sending(uint32_t to) const { return sends_[to].is_active; }
  bool is_sending(uint32_t to, uint64_t serial) const {
    return sends_[to].is_active && sends_[to].serial == serial;
  }
  uint64_t serial(uint32_t to) const { return sends_[to].serial; }
  void abandon_send(uint32_t to);
  // kOk when the receiver has taken every chunk.
  Status is_drained(uint32_t to);
  // Pushes all unfinished sends; part of every wait, so that two ranks that send to each other and
  // then receive cannot block each other.
  void push_all();

  // What push_all and pull would copy now, at most.
  uint64_t pushable_bytes() const;
  uint64_t pullable_bytes(uint32_t from) const;

  // kPending: nothing there. kTooLarge: the message exceeds `capacity`; it stays, `state.total` says.
  Status pull(uint32_t from, uint8_t* out, uint64_t capacity, RecvState& state);
  // Lends the next chunk; kBusy while one is lent.
  Status lend(uint32_t from, ChunkView& view);
  Status give_back(uint32_t from);

  uint64_t num_sent(uint32_t to) const { return sent_[to]; }
  uint64_t num_received(uint32_t from) const { return received_[from]; }

 private:
  uint64_t credits_used(uint32_t to) const;
  uint64_t credits_left(uint32_t to) const { return core_.params().p2p_slots - credits_used(to); }
  const ChunkMeta* next_chunk(uint32_t from) const;
  Status check(const ChunkMeta& meta, const RecvState& state) const;
  void acknowledge(uint32_t from);
  void publish_chunk(uint32_t to, SendState& send);

  Core& core_;
  Trace& trace_;
  std::vector<SendState> sends_;
  std::vector<uint64_t> sent_, received_;
  std::vector<uint8_t> lent_;
  uint32_t num_active_ = 0;
};

}  // namespace xds::xccl
