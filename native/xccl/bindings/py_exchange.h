// An exchange as Python holds it: with the arrays it points into, the port's turn, and typed errors.
#pragma once

#include "../exchange.h"
#include "port.h"
#include "rows.h"

namespace xds::xccl {

// Keeps alive what the exchange points into until it is released.
class PyExchange {
 public:
  PyExchange(nb::object port, const RowArray& rows, const std::optional<ScaleArray>& scales,
             bool quantize)
      : owner_(std::move(port)), port_(nb::cast<Port&>(owner_)), rows_(rows), scales_(scales) {
    const RowSource source = row_source(rows, scales, quantize);
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

  void add_rows(uint32_t rank, const TagTuple& tag, uint16_t kind,
                const std::optional<IntArray>& row_idx, const std::optional<IntArray>& meta,
                uint32_t reply_rows) {
    Turn turn(port_);
    check_rank(rank);
    const auto rows = row_idx ? span_of(*row_idx) : std::span<const int32_t>();
    const auto num_rows = static_cast<int64_t>(rows_.shape(0));
    for (const int32_t row : rows) {
      if (row >= 0 && row < num_rows) continue;
      throw nb::value_error("row_idx names a row outside of rows");
    }
    get().add_rows(rank, to_tag(tag), kind, rows,
                   meta ? span_of(*meta) : std::span<const int32_t>(), reply_rows);
  }

  // topk_ids is [T, K] flattened; with pair_rows, pair i is (pair_rows[i], topk_ids[i]).
  void add_routed(const IntArray& experts, uint32_t top_k, const std::optional<IntArray>& pair_rows,
                  const IntArray& expert_rank, const TagTuple& tag, uint16_t kind,
                  const Ranks& also) {
    Turn turn(port_);
    for (const uint32_t rank : also) check_rank(rank);
    if (experts.shape(0) > INT32_MAX || top_k == 0) throw nb::value_error("too many pairs");
    if (pair_rows && pair_rows->shape(0) != experts.shape(0)) {
      throw nb::value_error("pair_rows must have one entry per pair");
    }
    if (routed_) throw nb::value_error("an exchange is routed once; make another");
    Pairs pairs{.experts = experts.data(),
                .rows = pair_rows ? pair_rows->data() : nullptr,
                .num_slots = static_cast<uint32_t>(experts.shape(0)),
                .top_k = top_k};
    if (!get().add_routed(pairs, span_of(expert_rank), to_tag(tag), kind, also)) raise_routing();
    experts_ = experts;
    pair_rows_ = pair_rows;
    routed_ = true;
  }

  bool reroute(const Ranks& ranks, const IntArray& expert_rank, const TagTuple& tag) {
    Turn turn(port_);
    const size_t before = get().parts().size();
    if (!get().reroute(ranks, span_of(expert_rank), to_tag(tag))) raise_routing();
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
    Exchange& exchange = get();
    Status posted = Status::kPending;
    const auto ready = [&] {
      port_.p2p.push_all();
      posted = exchange.post();
      return posted != Status::kPending;
    };
    if (!ready()) {
      const uint32_t rank = exchange.blocking_rank();
      const Status status = wait_released(
          port_, ready, timeout_s, [&rank] { return std::span<const uint32_t>(&rank, 1); });
      if (status != Status::kOk) raise_wait(status);
    }
    port_.core.beat(now_ns());
    raise_post(posted);
  }

  bool is_done() {
    Turn turn(port_);
    return advance(get());
  }

  void wait(double timeout_s) {
    Turn turn(port_);
    Exchange& exchange = get();
    const auto ready = [&] {
      port_.p2p.push_all();
      return advance(exchange) || exchange.has_lost();
    };
    const Status status =
        wait_released(port_, ready, timeout_s, [&] { return exchange.owing(); });
    if (status != Status::kOk && !advance(exchange)) raise_wait(status);
    if (exchange.has_lost()) raise_lost("wait for answers", lost_ranks());
  }

  // For waits over several exchanges.
  bool advance_or_lost() { return advance(get()) || get().has_lost(); }
  std::span<const uint32_t> owing() { return get().owing(); }

  Ranks missing() {
    Turn turn(port_);
    advance(get());
    const auto owing = get().owing();
    Ranks ranks(owing.begin(), owing.end());
    for (const uint32_t rank : lost_ranks()) ranks.push_back(rank);
    return ranks;
  }

  std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> part_states() {
    std::vector<std::tuple<uint32_t, uint32_t, uint32_t>> states;
    for (const Part& part : get().parts()) {
      states.emplace_back(part.rank, static_cast<uint32_t>(part.state), part.detail);
    }
    return states;
  }

  // (rank, row type, rows, bytes per row, offset of scales, offset of rows) of an answered part.
  using ReplyTuple = std::tuple<uint32_t, uint32_t, uint32_t, uint32_t, uint64_t, uint64_t>;
  std::optional<ReplyTuple> reply_of(size_t index) {
    const std::vector<Part>& parts = get().parts();
    if (index >= parts.size() || parts[index].state != PartState::kAnswered) return std::nullopt;
    const Part& part = parts[index];
    if (port_.core.peer(part.rank).incarnation != part.incarnation) return std::nullopt;
    const ReplyHeader& reply = *part.reply;
    const RowPlaces places(0, reply.num_rows, reply.row_bytes,
                           static_cast<RowType>(reply.row_type));
    const uint64_t base =
        port_.core.peer(part.rank).segment->reply_offset(port_.core.rank(), part.seq);
    return ReplyTuple{part.rank,       reply.row_type,       reply.num_rows,
                      reply.row_bytes, base + places.scales, base + places.rows};
  }
  std::vector<int32_t> slots_of(size_t index) {
    if (index >= get().parts().size()) throw nb::index_error("no such part");
    const auto slots = get().pair_slots(get().parts()[index]);
    return {slots.begin(), slots.end()};
  }

  using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
  using Weights = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

  void gather(const Out& out) {
    Turn turn(port_);
    if (!routed_ || out.shape(0) != experts_->shape(0)) {
      throw nb::value_error("out must have one row per (token, expert) slot of a routed exchange");
    }
    Status status;
    {
      nb::gil_scoped_release release;
      status = get().gather(out.data(), static_cast<uint32_t>(out.shape(1)));
    }
    raise_combine(status);
  }
  void combine(const Weights& weights, const Out& out) {
    Turn turn(port_);
    if (!routed_ || weights.size() != experts_->shape(0) || weights.shape(0) != out.shape(0)) {
      throw nb::value_error("topk_weights must be [T, K] as topk_ids, and out [T, H]");
    }
    Status status;
    {
      nb::gil_scoped_release release;
      status = get().combine(weights.data(), out.data(), static_cast<uint32_t>(out.shape(0)),
                             static_cast<uint32_t>(out.shape(1)));
    }
    raise_combine(status);
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
    exchange.post();
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
  RowArray rows_;
  std::optional<ScaleArray> scales_;
  std::optional<IntArray> experts_, pair_rows_;
  bool routed_ = false;
  std::unique_ptr<Exchange> exchange_;
};

}  // namespace xds::xccl
