// The asking side of row exchanges: requests in my segment, replies in the server's.
//
// State of one of my slots for a server, and what moves it:
//
//   FREE --post--> WAITING --reply read--> FREE
//                     |
//                     +--abandon--> ABANDONED --late reply with that seq seen--> FREE
//
// A slot is used again only when its last request is answered, so a late answer can never be taken
// for another request's: it is found when the slot is wanted, counted, and dropped.
#pragma once

#include <vector>

#include "core.h"
#include "rows.h"
#include "trace.h"

namespace xds::xccl {

struct Request {
  Tag tag;
  uint16_t kind = 0;
  const int32_t* row_idx = nullptr;
  uint32_t num_rows = 0;
  const int32_t* meta = nullptr;
  uint32_t num_meta = 0;
  uint32_t reply_rows = 0;
};

class Asker {
 public:
  Asker(Core& core, Trace& trace);

  void reset(uint32_t rank);  // the server has a new life: its slots are free again

  // kPending: the slot is not free yet. kTooLarge: does not fit request_bytes.
  Status post(uint32_t to, const RowSource& source, const Request& request, uint64_t& seq);
  // kOk and a checked header, kPending, or kCorrupt.
  Status reply(uint32_t from, uint64_t seq, const ReplyHeader*& header) const;
  void finish(uint32_t from, uint64_t seq);
  void abandon(uint32_t from, uint64_t seq);

  uint32_t num_open(uint32_t rank) const;  // slots not free
  uint64_t num_late() const { return num_late_; }

 private:
  enum class Use : uint8_t { kFree, kWaiting, kAbandoned };
  struct Slot {
    Use use = Use::kFree;
    int64_t enqueue_ns = 0, visible_ns = 0;
    uint64_t bytes = 0;
  };

  Slot& slot(uint32_t rank, uint64_t seq) { return slots_[core_.layout().row_index(rank, seq)]; }
  bool reclaim(uint32_t rank, uint64_t seq);

  Core& core_;
  Trace& trace_;
  std::vector<Slot> slots_;
  std::vector<uint64_t> last_seq_;
  uint64_t num_late_ = 0;
};

}  // namespace xds::xccl
