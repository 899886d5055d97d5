// The bytes of a segment. Every rank owns one, and is the only one who writes to it, but for the
// doorbell and the window. Peers map the rest read-only: a late write of a dead or replaced
// incarnation can only reach its own, abandoned segment.
//
//   offset            size                         written by   mapped by peers
//   0                 SegmentHeader, 256           owner once   read-only   who, which run, layout
//   4096              LiveLine, 2 x 64             owner        read-only   heartbeat; sleeping
//   4096 + 128        LinkLine[max_ranks] x 64     owner        read-only   session, p2p credits
//   doorbell          64 (one page)                everybody    read-write  futex word
//   window            window_bytes                 everybody    read-write  put/get/signal
//   p2p_meta          [max_ranks][p2p_slots] x 64  owner        read-only   32 B field + 32 B inline
//   request_head      [max_ranks][row_slots] x 128 owner        read-only   what I ask of a peer
//   reply_head        [max_ranks][row_slots] x 64  owner        read-only   what I answer a peer
//   p2p_data          [max_ranks][p2p_slots] x p2p_slot_bytes
//   request_data      [max_ranks][row_slots] x request_bytes
//   reply_data        [max_ranks][row_slots] x reply_bytes
//
// [max_ranks] is the rank of the *peer*: the receiver of my messages and requests, the asker of my
// replies. Areas start on pages. Untouched pages cost nothing.
//
// Trust: the ranks of a run are processes of one user that trust each other. Every size and offset
// read from a peer is checked, which catches mistakes, version skew and crashes, not malice.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "atomics.h"

namespace xds::xccl {

inline constexpr char kMagic[8] = {'X', 'D', 'S', 'X', 'C', 'C', 'L', '\1'};
inline constexpr uint32_t kVersion = 1;
inline constexpr uint32_t kMaxRanks = 256;
inline constexpr uint64_t kMaxSegmentBytes = uint64_t{1} << 40;
inline constexpr uint64_t kNameBytes = 48;  // with the closing zero

// Equal on all ranks of a run; checked when a peer is attached.
struct LayoutParams {
  uint32_t max_ranks = 8;
  uint32_t p2p_slots = 16;             // per ordered pair; a power of two
  uint32_t p2p_slot_bytes = 64 << 10;  // a multiple of 64
  uint32_t row_slots = 4;              // requests under way per ordered pair; a power of two
  uint64_t request_bytes = 1 << 20;    // metadata + scales + rows of one request
  uint64_t reply_bytes = 1 << 20;      // scales + rows of one reply
  uint64_t window_bytes = 64 << 10;    // may be 0

  bool operator==(const LayoutParams&) const = default;
};
static_assert(sizeof(LayoutParams) == 40);

struct SegmentHeader {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  uint64_t total_bytes;
  uint32_t rank;
  int32_t pid;
  uint64_t pid_start;    // clock ticks since boot: tells a process from a later one with its pid
  uint64_t incarnation;  // microseconds since boot: grows with each life of a rank, never 0
  LayoutParams params;
  char run_id[kNameBytes];
  char name[kNameBytes];
  uint32_t state;  // SegmentState; the one field that changes
  uint32_t reserved[9];
};
static_assert(sizeof(SegmentHeader) == 224);

//   CREATING --(all areas zero, header written)--> READY --(close)--> CLOSED
enum class SegmentState : uint32_t { kCreating = 0, kReady = 1, kClosed = 2 };

// What ranks tell each other by any channel; fixed size.
inline constexpr uint64_t kBlobBytes = 256;
using Blob = std::array<uint8_t, kBlobBytes>;

struct alignas(64) LiveLine {
  uint64_t heartbeat;  // moves with every call and wait of the owner
};

struct alignas(64) SleepLine {
  uint32_t sleeping;  // 1 while the owner waits on its doorbell, or is about to
};

// My side of the link to one peer. The link is up when both sides name each other's incarnation.
//   peer_incarnation  0: being reset    else: my rings, acks and replies are meant for that life
struct alignas(64) LinkLine {
  uint64_t peer_incarnation;
  uint64_t p2p_received;  // chunks taken from that peer: its credits
};

struct alignas(64) Doorbell {
  uint32_t word;  // futex; any peer adds 1
};

struct Layout {
  LayoutParams params;
  uint64_t links, doorbell, window, p2p_meta, request_head, reply_head, p2p_data, request_data,
      reply_data, total_bytes;

  // Throws SegmentFault when a parameter is out of range or a sum overflows.
  explicit Layout(const LayoutParams& params);

  uint64_t p2p_index(uint32_t peer, uint64_t event) const {
    return static_cast<uint64_t>(peer) * params.p2p_slots + (event & (params.p2p_slots - 1));
  }
  uint64_t row_index(uint32_t peer, uint64_t seq) const {
    return static_cast<uint64_t>(peer) * params.row_slots + (seq & (params.row_slots - 1));
  }
};

// a * b + c and friends; throw SegmentFault instead of wrapping.
uint64_t checked_mul(uint64_t a, uint64_t b);
uint64_t checked_add(uint64_t a, uint64_t b);

// True when [offset, offset + size) lies in [0, limit).
constexpr bool fits(uint64_t offset, uint64_t size, uint64_t limit) {
  return size <= limit && offset <= limit - size;
}

Blob to_blob(const SegmentHeader& header);

// Checks magic, version, sizes, names and layout; throws SegmentFault with what is wrong.
SegmentHeader from_blob(const uint8_t* data, uint64_t size);

// "xds-<run_id>-<name>": letters, digits, '_' and '.'; the name may hold '-' too, the run id not.
std::string segment_name(const std::string& run_id, const std::string& name);

}  // namespace xds::xccl
