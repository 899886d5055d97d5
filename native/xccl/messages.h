// What lies in the slots: chunks of point-to-point messages, and requests and replies of rows.
//
// Chunk (one cache line; a message of up to 32 bytes is one line in all)
//    0  event u64        number of the chunk on this ordered pair, from 1; stored last (release)
//    8  chunk_idx u32    12  num_chunks u32    16  bytes u32    20  tag u32
//   24  total_bytes u64  32  payload, when num_chunks = 1 and bytes <= 32
//
// The sender may write chunk n when the receiver's LinkLine says p2p_received > n - 1 - p2p_slots.
//
//   slot     event in it      who may touch it
//   free     n - p2p_slots    sender
//   full     n                receiver (until it stores p2p_received = n)
//
// Request n of asker A to server S lies in A's slot n mod row_slots for S; its reply lies in S's
// slot n mod row_slots for A. So the asker names the reply's place, a server never waits for room,
// and a frozen asker holds up nobody.
//
//   A: request.seq   S: reply.seq   state of the slot pair
//   n                n              free for request n + row_slots, once A has read the reply
//   n                < n            under way: S may read the request, S alone writes the reply
//   n, cancel = n    < n            abandoned by A; S answers kCancelled when it comes by
//
// Request data:  [num_meta] int32 | pad to 64 | [num_rows] float32 scales | pad | rows
// Reply data:    [num_rows] float32 scales | pad to 64 | rows           (scales: int8 rows only)
#pragma once

#include <cstdint>

#include "atomics.h"

namespace xds::xccl {

inline constexpr uint32_t kInlineBytes = 32;

struct alignas(64) ChunkMeta {
  uint64_t event;
  uint32_t chunk_idx;
  uint32_t num_chunks;
  uint32_t bytes;
  uint32_t tag;
  uint64_t total_bytes;
  uint8_t payload[kInlineBytes];
};
static_assert(sizeof(ChunkMeta) == 64);

// Echoed by whoever answers, so that a late answer is recognised.
struct Tag {
  uint64_t step_idx = 0;
  uint32_t epoch = 0;
  uint16_t layer_idx = 0;
  uint16_t microbatch_idx = 0;

  bool operator==(const Tag&) const = default;
};
static_assert(sizeof(Tag) == 16);

enum class RowType : uint16_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kBytes = 3 };

constexpr uint32_t item_bytes(RowType type) {
  switch (type) {
    case RowType::kFloat32:
      return 4;
    case RowType::kBfloat16:
      return 2;
    case RowType::kInt8:
    case RowType::kBytes:
      return 1;
  }
  return 0;
}

constexpr bool is_row_type(uint16_t value) { return value <= 3; }

struct alignas(64) RequestHeader {
  uint64_t seq;  // stored last (release)
  Tag tag;
  uint64_t source_incarnation;
  uint32_t source_rank;
  uint16_t kind;  // the caller's; 0xFFFF is kForward
  uint16_t row_type;
  uint32_t num_rows;
  uint32_t row_bytes;
  uint32_t num_meta;
  uint32_t reply_rows;  // rows the asker expects; 0: it does not say
  int64_t sent_ns;      // 0 unless the asker traces
  // A line of its own, because it is almost never written.
  alignas(64) uint64_t cancel;  // == seq: the asker no longer wants the answer
};
static_assert(sizeof(RequestHeader) == 128);

enum class ReplyCode : uint16_t {
  kAnswer = 0,
  kRefused = 1,    // the server does not hold what was asked for (another routing epoch)
  kCancelled = 2,  // the asker had given up
};

struct alignas(64) ReplyHeader {
  uint64_t seq;  // stored last (release)
  Tag tag;       // the request's
  uint64_t source_incarnation;
  uint64_t target_incarnation;
  uint16_t code;  // ReplyCode
  uint16_t row_type;
  uint32_t num_rows;
  uint32_t row_bytes;
  uint32_t detail;  // the server's own number beside a refusal
  int64_t sent_ns;
};
static_assert(sizeof(ReplyHeader) == 64);

// A message of a trampoline: the receiver spreads the rows over the ranks that own their experts.
inline constexpr uint16_t kForward = 0xFFFF;

constexpr uint64_t round_to_line(uint64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Where the parts of a request or reply lie in its slot. `total` is to be compared with the slot; it
// saturates instead of wrapping.
struct RowPlaces {
  uint64_t scales, rows, total;

  RowPlaces(uint32_t num_meta, uint32_t num_rows, uint32_t row_bytes, RowType type) {
    scales = round_to_line(uint64_t{num_meta} * 4);
    rows = scales + (type == RowType::kInt8 ? round_to_line(uint64_t{num_rows} * 4) : 0);
    if (__builtin_add_overflow(rows, uint64_t{num_rows} * row_bytes, &total)) total = UINT64_MAX;
  }
};

}  // namespace xds::xccl
