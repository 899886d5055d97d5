// The asking side: an exchange with parts per rank, waits for its answers, and what replaces lost ranks.
#include "py_exchange.h"

namespace xds::xccl {

using namespace nb::literals;

namespace {

// True when one of the exchanges has ended (see PyExchange), or requests have arrived; false at the
// deadline, or when a rank that owes an answer is dead or frozen (ask each exchange).
bool wait_any(Port& port, const std::vector<PyExchange*>& exchanges, double timeout_s,
              bool or_requests) {
  Turn turn(port);
  for (PyExchange* exchange : exchanges) {  // while errors can still be raised
    if (exchange == nullptr) throw nb::type_error("exchanges holds None; it must hold exchanges");
    exchange->check_waitable(port);
  }
  std::vector<uint32_t> owed;
  const auto ready = [&] {
    port.p2p.push_all();
    bool news = or_requests && port.server.has_arrivals();
    for (PyExchange* exchange : exchanges) news |= exchange->advance_or_end();
    return news;
  };
  const auto owing = [&] {
    owed.clear();
    for (PyExchange* exchange : exchanges) {
      const auto ranks = exchange->owing();
      owed.insert(owed.end(), ranks.begin(), ranks.end());
    }
    return std::span<const uint32_t>(owed);
  };
  return wait_released(port, ready, timeout_s, owing) == Status::kOk;
}

}  // namespace

void bind_exchange(nb::module_& m, nb::class_<Port>& port) {
  nb::class_<PyExchange>(m, "Exchange")
      .def(nb::init<nb::object, nb::handle, nb::handle, bool>(),
           "port"_a, "rows"_a, "scales"_a.none() = nb::none(), "quantize"_a = false)
      .def("add_rows", &PyExchange::add_rows, "rank"_a, "tag"_a, "kind"_a,
           "row_idx"_a.none() = nb::none(), "meta"_a.none() = nb::none(), "reply_rows"_a = 0)
      .def("add_routed", &PyExchange::add_routed, "experts"_a, "top_k"_a, "pair_rows"_a.none(),
           "expert_rank"_a, "tag"_a, "kind"_a, "also"_a)
      .def("post_routed",
           [](PyExchange& self, nb::handle topk_ids, nb::handle expert_rank, const TagTuple& tag,
              uint16_t kind, double timeout_s) {
             self.post_routed(topk_ids, expert_rank, tag, kind, {}, timeout_s);
           },
           "topk_ids"_a, "expert_rank"_a, "tag"_a, "kind"_a, "timeout_s"_a)
      .def("reroute", &PyExchange::reroute, "ranks"_a, "expert_rank"_a, "tag"_a)
      .def("resend", &PyExchange::resend, "from_rank"_a, "to"_a, "tag"_a)
      .def("post", &PyExchange::post, "timeout_s"_a)
      .def("is_done", &PyExchange::is_done)
      .def("wait", &PyExchange::wait, "timeout_s"_a)
      .def("part_states", &PyExchange::part_states)
      .def("reply_views", &PyExchange::reply_views)
      .def("gather", &PyExchange::gather, "out"_a)
      .def("combine", &PyExchange::combine, "topk_weights"_a, "out"_a)
      .def("wait_combine", &PyExchange::wait_combine, "topk_weights"_a, "out"_a, "timeout_s"_a)
      .def("release", &PyExchange::release);
  port.def("wait_any", &wait_any, "exchanges"_a, "timeout_s"_a, "or_requests"_a = false)
      .def("num_open_slots", [](Port& p, uint32_t rank) {
        if (rank >= p.core.params().max_ranks) throw nb::value_error("no such rank");
        return p.asker.num_open(rank);
      })
      .def_prop_ro("num_late", [](Port& p) { return p.asker.num_late(); });
}

}  // namespace xds::xccl
