// The answering side: takes whatever has arrived from any rank and answers each request in the place
// its asker named. It never waits: neither for a particular asker, nor for room to answer.
//
//   request of (asker, seq):  PUBLISHED --take--> OPEN --reply / refuse--> ANSWERED
//                                 |
//                                 +--cancelled, or its header lies--> ANSWERED (kCancelled, kRefused)
#pragma once

#include <vector>

#include "core.h"
#include "rows.h"
#include "trace.h"

namespace xds::xccl {

// One request, lent in place until it is answered. Offsets are into the asker's segment.
struct Incoming {
  uint32_t source_rank;
  uint64_t source_incarnation;
  uint64_t seq;
  Tag tag;
  uint16_t kind;
  RowType row_type;
  uint32_t num_rows, row_bytes, num_meta, reply_rows;
  uint64_t meta_offset, scales_offset, rows_offset;
};

struct Answer {
  ReplyCode code = ReplyCode::kAnswer;
  RowType row_type = RowType::kFloat32;
  uint32_t num_rows = 0;
  uint32_t row_bytes = 0;
  uint32_t detail = 0;
};

class Server {
 public:
  static constexpr uint32_t kLyingHeader = 0xFFFFFFFF;  // detail of an automatic refusal

  Server(Core& core, Trace& trace);

  void reset(uint32_t rank);  // the asker has a new life: open requests of the old one are stale

  bool has_arrivals() const;
  // The next request in turn of ranks; false when nothing is there.
  bool take(Incoming& incoming);

  // Where the answer's scales and rows go, so that they can be computed in place.
  // kStale: the asker's life has ended. kBadArgument: not open. kTooLarge: exceeds reply_bytes.
  Status place(uint32_t to, uint64_t incarnation, uint64_t seq, const Answer& answer,
               uint64_t& scales_offset, uint64_t& rows_offset) const;
  // Publishes the answer whose bytes are in place.
  Status publish(uint32_t to, uint64_t incarnation, uint64_t seq, const Answer& answer);

  uint32_t num_open() const { return num_open_; }
  uint64_t num_cancelled() const { return num_cancelled_; }

 private:
  struct Slot {
    uint64_t seq = 0;  // 0: not open
    Tag tag;
    uint64_t bytes = 0;
    int64_t sent_ns = 0, seen_ns = 0;
  };

  const RequestHeader* next(uint32_t rank) const;
  bool open(uint32_t rank, const RequestHeader& header, Incoming& incoming);
  const Slot& slot(uint32_t rank, uint64_t seq) const {
    return slots_[core_.layout().row_index(rank, seq)];
  }
  Status check_open(uint32_t to, uint64_t incarnation, uint64_t seq) const;

  Core& core_;
  Trace& trace_;
  std::vector<Slot> slots_;
  std::vector<uint64_t> taken_;  // last seq seen, per asker
  uint32_t turn_ = 0;
  uint32_t num_open_ = 0;
  uint64_t num_cancelled_ = 0;
};

}  // namespace xds::xccl
