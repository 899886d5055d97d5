// A rank's place in an EP group: rows and word to every rank, and what every rank sent here.
#include "../gathering.h"
#include "batch.h"
#include "py_exchange.h"

namespace xds::xccl {

using namespace nb::literals;

namespace {

class PyEpGroup {
 public:
  PyEpGroup(nb::object port, const Ranks& ranks)
      : owner_(std::move(port)),
        port_(nb::cast<Port&>(owner_)),
        ranks_(ranks),
        gathering_(port_.core, port_.server, ranks) {
    for (const uint32_t rank : ranks) {
      if (rank >= port_.core.params().max_ranks) raise_status(Status::kBadRank, "EP group");
    }
  }

  void post(PyExchange& exchange, nb::handle topk_ids, nb::handle expert_rank, const TagTuple& tag,
            double timeout_s) {
    enter(std::get<0>(tag));
    exchange.post_routed(topk_ids, expert_rank, tag, 0, ranks_, timeout_s);
  }

  std::vector<PyBatch> recv(const TagTuple& tag_tuple, double timeout_s) {
    Turn turn(port_);
    const Tag tag = to_tag(tag_tuple);
    const auto is_complete = [&] {
      port_.p2p.push_all();
      return gathering_.take(tag);
    };
    if (!is_ready_now(port_, is_complete)) {
      const Status status =
          wait_released(port_, is_complete, timeout_s, [&] { return gathering_.missing(tag); });
      if (status != Status::kOk) raise_missing(status, tag);
    }
    arrived_.clear();
    gathering_.hand_out(tag, arrived_);
    return batches_of(owner_, arrived_);
  }

  // Each asker its consecutive share of the rows.
  void reply(const std::vector<PyBatch*>& batches, nb::handle rows) {
    const ArrayView view(rows, "rows", 2, kRowItems);
    RowSource source = row_source(view, {}, false);
    uint64_t total = 0;
    for (const PyBatch* batch : batches) total += batch->request().reply_rows;
    if (total != source.num_rows) {
      throw nb::value_error("rows must have one row per pair of the batches, in their order");
    }
    Turn turn(port_);
    for (PyBatch* batch : batches) {
      source.num_rows = batch->request().reply_rows;
      batch->copy_answer(source);
      source.rows += uint64_t{source.num_rows} * source.sent_row_bytes();
    }
  }

 private:
  void enter(uint32_t epoch) {
    Turn turn(port_);
    gathering_.enter(epoch);
  }

  [[noreturn]] void raise_missing(Status status, const Tag& tag) {
    const auto missing = gathering_.missing(tag);
    const Ranks owing(missing.begin(), missing.end());
    const Ranks ranks = status == Status::kPeerLost ? lost_among(port_, owing) : owing;
    std::string what = "dispatch of step " + std::to_string(tag.step_idx) + ", layer " +
                       std::to_string(tag.layer_idx) + ": nothing from rank";
    for (const uint32_t rank : ranks) what += " " + std::to_string(rank);
    raise_error(status == Status::kPeerLost ? "PeerLost" : "XcclTimeout",
                what + ": " + describe(status), ranks);
  }

  nb::object owner_;
  Port& port_;
  Ranks ranks_;
  Gathering gathering_;
  std::vector<Incoming> arrived_;
};

}  // namespace

void bind_ep_group(nb::module_& m) {
  m.attr("STALE_EPOCH") = Gathering::kStaleEpoch;
  nb::class_<PyEpGroup>(m, "EpGroup")
      .def(nb::init<nb::object, const Ranks&>(), "port"_a, "ranks"_a)
      .def("post", &PyEpGroup::post, "exchange"_a, "topk_ids"_a, "expert_rank"_a, "tag"_a,
           "timeout_s"_a)
      .def("reply", &PyEpGroup::reply, "batches"_a, "rows"_a)
      .def("recv", &PyEpGroup::recv, "tag"_a, "timeout_s"_a = 30.0);
}

}  // namespace xds::xccl
