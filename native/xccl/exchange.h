// One exchange of an asker: rows to any number of ranks, their answers, and what to do when a rank does
// not answer. The caller's rows stay as they are until the exchange is released, so that what a lost
// rank was given can be planned again and sent to others under a new epoch.
//
//   part:  PLANNED --post--> WAITING --answer--> ANSWERED | REFUSED
//             |                 |
//             +-----------------+--rank lost or not attached--> LOST <--rank replaced-- ANSWERED
//   any of PLANNED, WAITING, REFUSED, LOST --reroute--> MOVED (its pairs are in new parts)
#pragma once

#include <span>
#include <vector>

#include "asker.h"

namespace xds::xccl {

enum class PartState : uint32_t {
  kPlanned = 0,
  kWaiting = 1,
  kAnswered = 2,
  kRefused = 3,
  kLost = 4,
  kMoved = 5,
};

struct Part {
  uint32_t rank;
  PartState state = PartState::kPlanned;
  Tag tag;
  uint16_t kind = 0;
  uint64_t incarnation = 0, seq = 0;
  uint32_t first_row = 0, num_rows = 0;    // into row_idx
  uint32_t first_pair = 0, num_pairs = 0;  // into pair_slot; 0 pairs: rows go as they are
  uint32_t detail = 0;                     // of a refusal
  const ReplyHeader* reply = nullptr;
};

// (row, expert) pairs to be routed: pair `slot` takes row rows[slot], or slot / top_k.
struct Pairs {
  const int32_t* experts = nullptr;  // [num_slots]; -1: nobody
  const int32_t* rows = nullptr;     // [num_slots] or null
  uint32_t num_slots = 0;
  uint32_t top_k = 1;
};

class Exchange {
 public:
  Exchange(Core& core, Asker& asker) : core_(core), asker_(asker) {}

  void begin(const RowSource& source);

  // Plans one part with all rows, or with rows row_idx[..]; the answer is the rank's affair.
  void add_rows(uint32_t rank, const Tag& tag, uint16_t kind, std::span<const int32_t> row_idx,
                std::span<const int32_t> meta, uint32_t reply_rows);
  // Plans one part per rank that owns an expert of a pair. A row goes to a rank once; the metadata are
  // its (row, expert) pairs sorted by expert, then slot; the answer has one row per pair, in that
  // order. Ranks in `also` get a part in any case. `expert_rank` is [num_experts], -1: nowhere.
  // False when an expert or row is out of range, or lives nowhere.
  bool add_routed(const Pairs& pairs, std::span<const int32_t> expert_rank, const Tag& tag,
                  uint16_t kind, std::span<const uint32_t> also);
  // Plans the pairs of parts on `ranks` that are not answered anew; their old requests are abandoned.
  bool reroute(std::span<const uint32_t> ranks, std::span<const int32_t> expert_rank,
               const Tag& tag);
  // Sends whole parts without pairs that are on `from` to `to` instead.
  bool resend(uint32_t from, uint32_t to, const Tag& tag);

  // Posts planned parts; kPending when a slot is not free (`blocking` owe the answers that free them).
  Status post();
  std::span<const uint32_t> blocking();  // ranks of parts that are planned still
  uint64_t planned_bytes() const;        // of their rows
  // Collects what has arrived; true when every part is answered, refused or moved.
  bool collect();
  // Ranks whose answer is outstanding, and those among them that are lost for good.
  std::span<const uint32_t> owing();
  bool has_lost() const;
  // After the core found ranks dead: their parts are lost. A frozen rank's parts stay waiting.
  void mark_dead();

  // out[slot] of each pair = its answer row as float32. kBadArgument: an answer has another shape.
  Status gather(float* out, uint32_t width) const;
  // out[t] = sum over slots ascending of weights[slot] * answer row, from 0, in float32.
  Status combine(const float* weights, float* out, uint32_t tokens, uint32_t width) const;

  void release();  // abandons what is outstanding, frees the slots. Idempotent.

  const std::vector<Part>& parts() const { return parts_; }
  std::span<const int32_t> pair_slots(const Part& part) const {
    return {pair_slot_.data() + part.first_pair, part.num_pairs};
  }

 private:
  bool plan(std::span<const int32_t> slots, std::span<const int32_t> expert_rank, const Tag& tag,
            uint16_t kind, std::span<const uint32_t> also);
  bool count_pairs(std::span<const int32_t> slots, std::span<const int32_t> expert_rank);
  void plan_part(uint32_t rank, uint32_t first_pair, uint32_t num_pairs, const Tag& tag,
                 uint16_t kind);
  Status post_part(Part& part);
  template <class Owes>
  std::span<const uint32_t> ranks_of(Owes&& owes);
  void give_up(Part& part, PartState state);
  uint32_t row_of(int32_t slot) const {
    return pairs_.rows ? static_cast<uint32_t>(pairs_.rows[slot])
                       : static_cast<uint32_t>(slot) / pairs_.top_k;
  }

  bool map_slots(uint32_t width, uint32_t num_slots) const;

  struct MetaRange {
    uint32_t first, count, reply_rows;
  };
  struct RowView {
    const uint8_t* data;
    RowType type;
    float scale;
  };

  Core& core_;
  Asker& asker_;
  RowSource source_;
  Pairs pairs_;
  std::vector<Part> parts_;
  std::vector<MetaRange> metas_;  // per part
  std::vector<int32_t> row_idx_, meta_, pair_slot_;
  std::vector<int32_t> slots_, local_row_;  // scratch
  std::vector<uint32_t> owing_, expert_count_, expert_next_, starts_, cursor_;
  mutable std::vector<RowView> slot_row_;  // scratch of gather and combine
};

}  // namespace xds::xccl
