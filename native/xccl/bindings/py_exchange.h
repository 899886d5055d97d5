// An exchange as Python holds it: with the arrays it points into, the port's turn, and typed errors.
#pragma once

#include "../exchange.h"
#include "port.h"
#include "rows.h"

namespace xds::xccl {

// Keeps alive what the exchange points into until it is released.
class PyExchange {
 public:
  PyExchange(nb::object port, nb::handle rows, nb::handle scales, bool quantize)
      : owner_(std::move(port)),
        port_(nb::cast<Port&>(owner_)),
        rows_(rows, "rows", 2, kRowItems),
        scales_(scales_view(scales)) {
    const RowSource source = row_source(rows_, scales_, quantize);
    Turn turn(port_);
    if (port_.idle_exchanges.empty()) {
      exchange_ = std::make_unique<Exchange>(port_.core, port_.asker);
    } else {
      exchange_ = std::move(port_.idle_exchanges.back());
      port_.idle_exchanges.pop_back();
    }
    exchange_->begin(source);
  }
  ~PyExchange() {
    if (exchange_) give_back();
  }

  void add_rows(uint32_t rank, const TagTuple& tag, uint16_t kind, nb::handle row_idx,
                nb::handle meta, uint32_t reply_rows) {
    Turn turn(port_);
    check_rank(rank);
    const ArrayView rows = row_idx.is_none() ? ArrayView() : ArrayView(row_idx, "row_idx", 1, kInts);
    const ArrayView words = meta.is_none() ? ArrayView() : ArrayView(meta, "meta", 1, kInts);
    const auto idx = rows.is_held() ? rows.ints() : std::span<const int32_t>();
    const auto num_rows = static_cast<int64_t>(rows_.shape(0));
    for (const int32_t row : idx) {
      if (row >= 0 && row < num_rows) continue;
      throw nb::value_error("row_idx names a row outside of rows");
    }
    get().add_rows(rank, to_tag(tag), kind, idx,
                   words.is_held() ? words.ints() : std::span<const int32_t>(), reply_rows);
  }

  // topk_ids is [T, K] flattened; with pair_rows, pair i is (pair_rows[i], topk_ids[i]).
  void add_routed(nb::handle experts, uint32_t top_k, nb::handle pair_rows, nb::handle expert_rank,
                  const TagTuple& tag, uint16_t kind, const Ranks& also) {
    Turn turn(port_);
    ArrayView rows = pair_rows.is_none() ? ArrayView() : ArrayView(pair_rows, "pair_rows", 1, kInts);
    route({experts, "experts", 1, kInts}, top_k, std::move(rows),
          {expert_rank, "expert_rank", 1, kInts}, to_tag(tag), kind, also);
  }

  // add_routed of [T, K] ids, then post: one call where a step makes many.
  void post_routed(nb::handle topk_ids, nb::handle expert_rank, const TagTuple& tag, uint16_t kind,
                   std::span<const uint32_t> also, double timeout_s) {
    Turn turn(port_);
    ArrayView ids(topk_ids, "topk_ids", 2, kInts);
    const auto top_k = static_cast<uint32_t>(ids.shape(1));
    route(std::move(ids), top_k, {}, {expert_rank, "expert_rank", 1, kInts}, to_tag(tag), kind,
          also);
    post_planned(timeout_s);
  }

  bool reroute(const Ranks& ranks, nb::handle expert_rank, const TagTuple& tag) {
    Turn turn(port_);
    const ArrayView owners(expert_rank, "expert_rank", 1, kInts);
    const size_t before = get().parts().size();
    if (!get().reroute(ranks, owners.ints(), to_tag(tag))) raise_routing();
    return get().parts().size() > before;
  }
  bool resend(uint32_t from, uint32_t to, const TagTuple& tag) {
    Turn turn(port_);
    check_rank(to);
    return get().resend(from, to, to_tag(tag));
  }

  // Posts what is planned; waits while slots are not free.
  void post(double timeout_s) {
    Turn turn(port_);
    post_planned(timeout_s);
  }

  // `wait` without waiting: false instead of a timeout.
  bool is_done() {
    Turn turn(port_);
    Exchange& exchange = get();
    const Status status = ask_once(
        port_, [&] { return has_ended(exchange); }, [&] { return exchange.owing(); },
        exchange.planned_bytes());
    if (status == Status::kTimeout) return false;
    end_wait(status);
    return true;
  }

  void wait(double timeout_s) {
    Turn turn(port_);
    wait_answered(timeout_s);
  }

  // For waits over several exchanges, of which each was found to be waitable.
  void check_waitable(const Port& port) {
    if (&port != &port_) throw nb::value_error("an exchange is of another port; wait on that one");
    get();
  }
  bool advance_or_end() { return has_ended(get()); }
  std::span<const uint32_t> owing() { return get().owing(); }

  std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> part_states() {
    std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> states;
    for (const Part& part : get().parts()) {
      states.emplace_back(part.rank, static_cast<uint32_t>(part.state), part.detail);
    }
    return states;
  }

  // (rank, slots, rows, scales or None) of each answered part; views in place.
  std::vector<nb::tuple> reply_views() {
    std::vector<nb::tuple> replies;
    for (const Part& part : get().parts()) {
      const bool is_same_life = port_.core.is_attached(part.rank) &&
                                port_.core.peer(part.rank).incarnation == part.incarnation;
      if (part.state == PartState::kAnswered && is_same_life) replies.push_back(view_of(part));
    }
    return replies;
  }

  void gather(nb::handle out_array) {
    Turn turn(port_);
    const ArrayView out(out_array, "out", 2, kFloats, ArrayView::Use::kWrite);
    if (!is_routed() || out.shape(0) != experts_.size()) {
      throw nb::value_error("out must have one row per (token, expert) slot of a routed exchange");
    }
    Exchange& exchange = get();
    Status status;
    {
      nb::gil_scoped_release release;
      status = exchange.gather(out.data<float>(), static_cast<uint32_t>(out.shape(1)));
    }
    raise_combine(status);
  }
  void combine(nb::handle topk_weights, nb::handle out) {
    Turn turn(port_);
    add_up(topk_weights, out);
  }
  void wait_combine(nb::handle topk_weights, nb::handle out, double timeout_s) {
    Turn turn(port_);
    wait_answered(timeout_s);
    add_up(topk_weights, out);
  }

  void release() {
    if (!exchange_) return;
    Turn turn(port_);
    give_back();
  }

 private:
  Exchange& get() {
    if (!exchange_) raise_error("XcclError", "the exchange is released", {});
    return *exchange_;
  }
  bool is_routed() const { return experts_.is_held(); }

  void route(ArrayView experts, uint32_t top_k, ArrayView pair_rows, const ArrayView& expert_rank,
             const Tag& tag, uint16_t kind, std::span<const uint32_t> also) {
    for (const uint32_t rank : also) check_rank(rank);
    if (experts.size() > INT32_MAX || top_k == 0) throw nb::value_error("too many pairs");
    if (pair_rows.is_held() && pair_rows.size() != experts.size()) {
      throw nb::value_error("pair_rows must have one entry per pair");
    }
    if (is_routed()) throw nb::value_error("an exchange is routed once; make another");
    const Pairs pairs{.experts = experts.data<const int32_t>(),
                      .rows = pair_rows.is_held() ? pair_rows.data<const int32_t>() : nullptr,
                      .num_slots = static_cast<uint32_t>(experts.size()),
                      .top_k = top_k};
    if (!get().add_routed(pairs, expert_rank.ints(), tag, kind, also)) raise_routing();
    experts_ = std::move(experts);
    pair_rows_ = std::move(pair_rows);
  }

  void post_planned(double timeout_s) {
    Exchange& exchange = get();
    const auto ready = [&] {
      port_.p2p.push_all();
      posted_ = exchange.post();
      return posted_ != Status::kPending || exchange.has_lost();
    };
    if (!is_ready_now(port_, ready, exchange.planned_bytes())) {
      const Status status =
          wait_released(port_, ready, timeout_s, [&] { return exchange.blocking(); });
      if (status != Status::kOk) raise_wait(status);
    }
    if (posted_ == Status::kPending) raise_lost("wait for a slot", lost_ranks());
    raise_post(posted_);
  }

  void wait_answered(double timeout_s) {
    Exchange& exchange = get();
    end_wait(wait_released(
        port_, [&] { return has_ended(exchange); }, timeout_s, [&] { return exchange.owing(); }));
  }
  // There is nothing to wait for: all is answered, a rank is lost, or a part cannot be sent.
  bool has_ended(Exchange& exchange) {
    port_.p2p.push_all();
    return advance(exchange) || exchange.has_lost() || !can_post();
  }
  bool can_post() const { return posted_ == Status::kOk || posted_ == Status::kPending; }
  void end_wait(Status status) {
    if (status != Status::kOk && !advance(get())) raise_wait(status);
    if (!can_post()) raise_post(posted_);
    if (get().has_lost()) raise_lost("wait for answers", lost_ranks());
  }

  void add_up(nb::handle topk_weights, nb::handle out_array) {
    const ArrayView weights(topk_weights, "topk_weights", 2, kFloats);
    const ArrayView out(out_array, "out", 2, kFloats, ArrayView::Use::kWrite);
    if (!is_routed() || weights.size() != experts_.size() || weights.shape(0) != out.shape(0)) {
      throw nb::value_error("topk_weights must be [T, K] as topk_ids, and out [T, H]");
    }
    Exchange& exchange = get();
    Status status;
    {
      nb::gil_scoped_release release;
      status = exchange.combine(weights.data<const float>(), out.data<float>(),
                             static_cast<uint32_t>(out.shape(0)),
                             static_cast<uint32_t>(out.shape(1)));
    }
    raise_combine(status);
  }

  nb::tuple view_of(const Part& part) {
    const ReplyHeader& reply = *part.reply;
    const auto type = static_cast<RowType>(reply.row_type);
    const RowPlaces places(0, reply.num_rows, reply.row_bytes, type);
    const Segment& theirs = *port_.core.peer(part.rank).segment;
    const uint8_t* base = theirs.base() + theirs.reply_offset(port_.core.rank(), part.seq);
    const nb::handle keeper = port_.keeper(part.rank);
    const auto slots = get().pair_slots(part);
    return nb::make_tuple(part.rank, std::vector<int32_t>(slots.begin(), slots.end()),
                          view_rows(base + places.rows, type, reply.num_rows, reply.row_bytes, keeper),
                          view_scales(base + places.scales, type, reply.num_rows, keeper));
  }

  void give_back() {
    exchange_->release();
    port_.idle_exchanges.push_back(std::move(exchange_));
  }
  void check_rank(uint32_t rank) {
    if (rank >= port_.core.params().max_ranks) {
      raise_status(Status::kBadRank, "exchange with rank " + std::to_string(rank));
    }
  }
  bool advance(Exchange& exchange) {
    posted_ = exchange.post();
    return exchange.collect();
  }
  Ranks lost_ranks() {
    Ranks ranks;
    for (const Part& part : get().parts()) {
      const bool is_new = std::find(ranks.begin(), ranks.end(), part.rank) == ranks.end();
      if (part.state == PartState::kLost && is_new) ranks.push_back(part.rank);
    }
    return ranks;
  }
  [[noreturn]] void raise_lost(const char* what, const Ranks& ranks) {
    std::string text = std::string(what) + ": rank";
    for (const uint32_t rank : ranks) {
      text += " " + std::to_string(rank) + (port_.core.is_gone(rank) ? " (dead)" : " (lost)");
    }
    raise_error("PeerLost", text + "; reroute or resend its part, or release", ranks);
  }
  [[noreturn]] void raise_wait(Status status) {
    const auto owing = get().owing();
    const Ranks owed(owing.begin(), owing.end());
    if (status == Status::kPeerLost) {
      const Ranks lost = lost_among(port_, owed);
      get().mark_dead();
      raise_lost("wait for answers", lost);
    }
    raise_error("XcclTimeout", std::string("wait for answers: ") + describe(status), owed);
  }
  void raise_post(Status status) {
    if (status == Status::kOk) return;
    raise_status(status, "a request exceeds request_bytes=" +
                             std::to_string(port_.core.params().request_bytes) +
                             "; send fewer rows or raise it");
  }
  [[noreturn]] static void raise_routing() {
    throw nb::value_error(
        "topk_ids names an expert outside of expert_rank, one that lives on no rank (-1), or a row "
        "outside of hidden_states");
  }
  void raise_combine(Status status) {
    if (status == Status::kOk) return;
    raise_error("XcclError",
                "an answer is missing, refused, or not one row of the expected width per "
                "(token, expert) pair",
                {});
  }

  nb::object owner_;
  Port& port_;
  ArrayView rows_, scales_, experts_, pair_rows_;
  std::unique_ptr<Exchange> exchange_;
  Status posted_ = Status::kOk;  // of what was planned, when it was last tried
};

}  // namespace xds::xccl
