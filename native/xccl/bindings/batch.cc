// The answering side: poll, and copied, or computed in place.
#include "batch.h"

namespace xds::xccl {

using namespace nb::literals;

PyBatch::PyBatch(nb::object port, const Incoming& request)
    : owner_(std::move(port)),
      port_(*nb::inst_ptr<Port>(owner_)),
      base_(port_.core.peer(request.source_rank).segment->base()),
      request_(request) {
  keeper_ = nb::borrow(port_.keeper(request.source_rank));
}

nb::object PyBatch::meta() const {
  using View = nb::ndarray<nb::numpy, const int32_t, nb::ndim<1>>;
  const auto* data = reinterpret_cast<const int32_t*>(base_ + request_.meta_offset);
  return nb::cast(View(data, {request_.num_meta}, keeper_));
}

nb::object PyBatch::pairs() const {
  if (request_.num_meta % 2 != 0) throw nb::value_error("the metadata are no pairs");
  using View = nb::ndarray<nb::numpy, const int32_t, nb::ndim<2>>;
  const auto* data = reinterpret_cast<const int32_t*>(base_ + request_.meta_offset);
  return nb::cast(View(data, {request_.num_meta / 2, 2}, keeper_));
}

Status PyBatch::place(const Answer& answer, uint64_t& scales_offset, uint64_t& rows_offset) const {
  return port_.server.place(request_.source_rank, request_.source_incarnation, request_.seq, answer,
                            scales_offset, rows_offset);
}

Status PyBatch::publish(const Answer& answer) {
  return port_.server.publish(request_.source_rank, request_.source_incarnation, request_.seq,
                              answer);
}

bool PyBatch::settle(Status status, const Answer& answer) const {
  if (status == Status::kOk) return true;
  if (status == Status::kStale) return false;
  std::string what = "answer of " + std::to_string(answer.num_rows) + " rows of " +
                     std::to_string(answer.row_bytes) + " bytes to rank " +
                     std::to_string(request_.source_rank) + " (reply_bytes=" +
                     std::to_string(port_.core.params().reply_bytes) + ")";
  if (status == Status::kBadArgument) what += ": the request is answered already";
  raise_status(status, what);
  return true;
}

bool PyBatch::reply(nb::handle rows, nb::handle scales, bool quantize) {
  const ArrayView row_view(rows, "rows", 2, kRowItems), scale_view = scales_view(scales);
  const RowSource source = row_source(row_view, scale_view, quantize);
  Turn turn(port_);
  return copy_answer(source);
}

bool PyBatch::copy_answer(const RowSource& source) {
  const Answer answer{.row_type = source.sent_type(),
                      .num_rows = source.num_rows,
                      .row_bytes = source.sent_row_bytes()};
  uint64_t scales_offset = 0, rows_offset = 0;
  if (!settle(place(answer, scales_offset, rows_offset), answer)) return false;
  nb::gil_scoped_release release;
  uint8_t* base = port_.core.own().base();
  copy_rows(source, nullptr, source.num_rows, reinterpret_cast<float*>(base + scales_offset),
            base + rows_offset);
  return publish(answer) == Status::kOk;
}

nb::object PyBatch::answer_buffer(uint32_t num_rows, uint32_t width) {
  Turn turn(port_);
  const Answer answer{.num_rows = num_rows, .row_bytes = width * 4};
  uint64_t scales = 0, rows = 0;
  if (!settle(place(answer, scales, rows), answer)) return nb::none();
  using View = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
  auto* data = reinterpret_cast<float*>(port_.core.own().base() + rows);
  return nb::cast(View(data, {num_rows, width}, port_.own_keeper()));
}

bool PyBatch::commit(uint32_t num_rows, uint32_t width) {
  Turn turn(port_);
  const Answer answer{.num_rows = num_rows, .row_bytes = width * 4};
  return settle(publish(answer), answer);
}

bool PyBatch::refuse(uint32_t detail) {
  Turn turn(port_);
  const Answer answer{.code = ReplyCode::kRefused, .detail = detail};
  return settle(publish(answer), answer);
}

std::vector<PyBatch> batches_of(nb::handle port, const std::vector<Incoming>& arrived) {
  std::vector<PyBatch> batches;
  batches.reserve(arrived.size());
  for (const Incoming& request : arrived) batches.emplace_back(nb::borrow(port), request);
  return batches;
}

namespace {

std::vector<PyBatch> poll(nb::handle_t<Port> self, double timeout_s, uint32_t max_requests) {
  Port& port = *nb::inst_ptr<Port>(self);
  Turn turn(port);
  std::vector<Incoming> arrived;
  Incoming incoming;
  const auto take = [&] {
    port.p2p.push_all();
    while (arrived.size() < max_requests && port.server.take(incoming)) arrived.push_back(incoming);
    return !arrived.empty();
  };
  if (!is_ready_now(port, take) && timeout_s != 0.0) {
    wait_released(port, take, timeout_s, [] { return std::span<const uint32_t>(); });
  }
  return batches_of(self, arrived);
}

template <auto Member>
auto field(const PyBatch& batch) {
  return batch.request().*Member;
}

}  // namespace

void bind_batch(nb::module_& m, nb::class_<Port>& port) {
  nb::class_<PyBatch>(m, "Batch")
      .def_prop_ro("source_rank", &field<&Incoming::source_rank>)
      .def_prop_ro("source_incarnation", &field<&Incoming::source_incarnation>)
      .def_prop_ro("kind", &field<&Incoming::kind>)
      .def_prop_ro("num_rows", &field<&Incoming::num_rows>)
      .def_prop_ro("reply_rows", &field<&Incoming::reply_rows>)
      .def_prop_ro("tag", &PyBatch::tag)
      .def_prop_ro("meta", &PyBatch::meta)
      .def_prop_ro("pairs", &PyBatch::pairs)
      .def_prop_ro("rows", &PyBatch::rows)
      .def_prop_ro("scales", &PyBatch::scales)
      .def("reply", &PyBatch::reply, "rows"_a, "scales"_a.none() = nb::none(),
           "quantize"_a = false)
      .def("answer_buffer", &PyBatch::answer_buffer, "num_rows"_a, "width"_a)
      .def("commit", &PyBatch::commit, "num_rows"_a, "width"_a)
      .def("refuse", &PyBatch::refuse, "detail"_a = 0)
      .def("__repr__", [](const PyBatch& b) {
        return nb::str("Batch(from {}, {}, kind {}, {} rows)")
            .format(b.request().source_rank, b.tag(), b.request().kind, b.request().num_rows);
      });
  port.def("poll", &poll, "timeout_s"_a = 0.0, "max_requests"_a = 64)
      .def_prop_ro("num_open_requests", [](Port& p) { return p.server.num_open(); })
      .def_prop_ro("num_cancelled", [](Port& p) { return p.server.num_cancelled(); });
}

}  // namespace xds::xccl
