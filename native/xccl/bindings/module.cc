// The compiled module `xdeepserve._xccl`: memory-semantic communication between processes of a host.
#include "../liveness.h"
#include "port.h"

namespace xds::xccl {

using namespace nb::literals;

namespace {

using ByteView = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;

template <class Call>
auto checked(Call&& call) {
  try {
    return call();
  } catch (const SegmentFault& fault) {
    raise_error("SegmentError", fault.what(), {});
  }
}

Blob to_array(const nb::bytes& blob) {
  const auto* data = static_cast<const uint8_t*>(blob.data());
  from_blob(data, blob.size());
  Blob array{};
  std::copy_n(data, array.size(), array.begin());
  return array;
}

nb::bytes to_bytes(const Blob& blob) { return nb::bytes(blob.data(), blob.size()); }

void init_port(Port* self, const std::string& run_id, const std::string& name, uint32_t rank,
               const LayoutParams& params, double frozen_after_s) {
  if (!(frozen_after_s > 0 && frozen_after_s < 1e6)) {
    throw nb::value_error("frozen_after_s must be positive");
  }
  checked([&] {
    new (self) Port(Segment::create(run_id, name, rank, params),
                    static_cast<int64_t>(frozen_after_s * 1e9));
  });
}

void attach(Port& port, const nb::bytes& blob) {
  Turn turn(port);
  checked([&] { port.attach(Segment::open(to_array(blob))); });
}

ByteView own_bytes(Port& port) {
  const auto& segment = port.core.own_segment();
  return ByteView(segment->base(), {segment->size()}, port.own_keeper());
}

// (state, pid, incarnation, seconds of observed silence)
std::tuple<uint32_t, int32_t, uint64_t, double> peer_status(Port& port, uint32_t rank) {
  Turn turn(port);
  if (!port.core.is_attached(rank)) return {0, 0, 0, 0.0};
  port.core.peer(rank).pulse.ask_afresh();
  const PeerState state = port.core.look(rank);
  const Peer& peer = port.core.peer(rank);
  return {static_cast<uint32_t>(state), peer.segment->header().pid, peer.incarnation,
          static_cast<double>(peer.pulse.silence_ns()) * 1e-9};
}

nb::list take_trace(Port& port) {
  Turn turn(port);
  nb::list records;
  for (const TraceRecord& r : port.trace.take()) {
    records.append(nb::make_tuple(static_cast<uint32_t>(r.kind), r.peer, r.tag, r.layer_idx,
                                  r.microbatch_idx, r.bytes, r.enqueue_ns, r.visible_ns,
                                  r.done_ns));
  }
  return records;
}

void arm_fault(const std::string& name, uint32_t countdown) {
  for (uint32_t i = 0; i < static_cast<uint32_t>(FaultPoint::kCount); ++i) {
    if (name != fault_name(static_cast<FaultPoint>(i))) continue;
    fault_countdown = countdown;
    armed_fault = i;
    return;
  }
  if (name != "delays") throw nb::value_error("no such fault point");
  armed_fault = kDelays;
}

nb::list fault_names() {
  nb::list names;
  for (uint32_t i = 1; i < static_cast<uint32_t>(FaultPoint::kCount); ++i) {
    names.append(fault_name(static_cast<FaultPoint>(i)));
  }
  return names;
}

void bind_layout(nb::module_& m) {
  nb::class_<LayoutParams>(m, "LayoutParams")
      .def("__init__",
           [](LayoutParams* self, uint32_t max_ranks, uint32_t p2p_slots, uint32_t p2p_slot_bytes,
              uint32_t row_slots, uint64_t request_bytes, uint64_t reply_bytes,
              uint64_t window_bytes) {
             new (self) LayoutParams{max_ranks,     p2p_slots,   p2p_slot_bytes, row_slots,
                                     request_bytes, reply_bytes, window_bytes};
           })
      .def_prop_ro("segment_bytes", [](const LayoutParams& params) {
        return checked([&] { return Layout(params).total_bytes; });
      });
}

// What is told to a peer, decoded and checked: (run_id, name, rank, pid, incarnation, bytes).
std::tuple<std::string, std::string, uint32_t, int32_t, uint64_t, uint64_t> describe_blob(
    const nb::bytes& blob) {
  return checked([&] {
    const auto* data = static_cast<const uint8_t*>(blob.data());
    const SegmentHeader h = from_blob(data, blob.size());
    return std::make_tuple(std::string(h.run_id), std::string(h.name), h.rank, h.pid,
                           h.incarnation, h.total_bytes);
  });
}

bool is_running(const nb::bytes& blob) {
  return checked([&] {
    const SegmentHeader h = from_blob(static_cast<const uint8_t*>(blob.data()), blob.size());
    return h.state != static_cast<uint32_t>(SegmentState::kClosed) &&
           process_start(h.pid) == h.pid_start;
  });
}

}  // namespace

NB_MODULE(_xccl, m) {
  m.doc() = "XCCL: memory-semantic communication between the processes of one host.";
  m.attr("BLOB_BYTES") = kBlobBytes;
  m.attr("FORWARD") = kForward;
  bind_layout(m);
  nb::class_<Port> port(m, "Port");
  port.def("__init__", &init_port, "run_id"_a, "name"_a, "rank"_a, "params"_a, "frozen_after_s"_a)
      .def("blob", [](Port& p) { return to_bytes(to_blob(p.core.own().header())); })
      .def("attach", &attach, "blob"_a)
      .def("unlink", [](Port& p) { return p.core.own().unlink(); })
      .def("close_segment", [](Port& p) { p.core.own().close(); })
      .def("beat", [](Port& p) { p.core.beat(); })
      .def("ring_self", [](Port& p) { p.core.ring_self(); })
      .def("is_linked",
           [](Port& p, uint32_t rank) { return p.core.is_attached(rank) && p.core.is_linked(rank); },
           "rank"_a)
      .def("peer_status", &peer_status, "rank"_a)
      .def("peer_incarnation",
           [](Port& p, uint32_t rank) -> uint64_t {
             return p.core.is_attached(rank) ? p.core.peer(rank).incarnation : 0;
           },
           "rank"_a)
      .def("own_bytes", &own_bytes)
      .def("open_trace", [](Port& p, uint64_t capacity) { p.trace.open(capacity); }, "capacity"_a)
      .def("take_trace", &take_trace)
      .def_prop_ro("rank", [](Port& p) { return p.core.rank(); })
      .def_prop_ro("incarnation", [](Port& p) { return p.core.incarnation(); })
      .def_prop_ro("window_offset", [](Port& p) { return p.core.layout().window; });
  bind_p2p(m, port);
  bind_window(port);
  bind_batch(m, port);
  bind_exchange(m, port);
  bind_ep_group(m);
  bind_ceiling(m);
  m.def("read_blob", [](const std::string& run_id, const std::string& name) {
    return checked([&] { return to_bytes(Segment::read_blob(run_id, name)); });
  }, "run_id"_a, "name"_a);
  m.def("describe_blob", &describe_blob, "blob"_a);
  m.def("is_running", &is_running, "blob"_a);
  m.def("arm_fault", &arm_fault, "name"_a, "countdown"_a = 1);
  m.def("fault_names", &fault_names);
}

}  // namespace xds::xccl
