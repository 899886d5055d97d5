// The answering side: poll, and answers copied or computed in place.
#include "rows.h"

#include "port.h"

namespace xds::xccl {

using namespace nb::literals;

RowType row_type(const nb::ndarray<>& array, const char* what) {
  if (array.dtype() == nb::dtype<float>()) return RowType::kFloat32;
  if (array.dtype() == nb::dtype<uint16_t>()) return RowType::kBfloat16;
  if (array.dtype() == nb::dtype<int8_t>()) return RowType::kInt8;
  if (array.dtype() == nb::dtype<uint8_t>()) return RowType::kBytes;
  throw nb::type_error(
      (std::string(what) + " must be float32, uint16 (bfloat16 bits), int8 or uint8").c_str());
}

RowSource row_source(const RowArray& rows, const std::optional<ScaleArray>& scales, bool quantize) {
  RowSource source;
  source.type = row_type(nb::ndarray<>(rows), "rows");
  if (rows.shape(0) > UINT32_MAX || rows.shape(1) > (uint64_t{1} << 28)) {
    throw nb::value_error("rows have at most 2**32 - 1 rows of 2**28 items");
  }
  source.rows = static_cast<const uint8_t*>(rows.data());
  source.num_rows = static_cast<uint32_t>(rows.shape(0));
  source.width = static_cast<uint32_t>(rows.shape(1));
  source.quantize = quantize;
  const bool is_int8 = source.type == RowType::kInt8;
  if (is_int8 != scales.has_value()) {
    throw nb::value_error("int8 rows come with one float32 scale each, others without");
  }
  if (quantize && (is_int8 || source.type == RowType::kBytes)) {
    throw nb::value_error("only float32 and bfloat16 rows can be quantized");
  }
  if (scales && scales->shape(0) != rows.shape(0)) {
    throw nb::value_error("scales must have one entry per row");
  }
  if (scales) source.scales = scales->data();
  return source;
}

namespace {

std::vector<Incoming> poll(Port& port, double timeout_s, uint32_t max_requests) {
  Turn turn(port);
  std::vector<Incoming> arrived;
  Incoming incoming;
  const auto take = [&] {
    port.p2p.push_all();
    while (arrived.size() < max_requests && port.server.take(incoming)) arrived.push_back(incoming);
    return !arrived.empty();
  };
  if (timeout_s == 0.0 || take()) {
    if (arrived.empty()) take();
    port.core.beat(now_ns());
    return arrived;
  }
  wait_released(port, take, timeout_s, [] { return std::span<const uint32_t>(); });
  return arrived;
}

// False when the asker's life has ended and nobody waits for the answer.
bool settled(Status status, const Incoming& request, const Answer& answer, uint64_t limit) {
  if (status == Status::kStale) return false;
  std::string what = "answer of " + std::to_string(answer.num_rows) + " rows of " +
                     std::to_string(answer.row_bytes) + " bytes to rank " +
                     std::to_string(request.source_rank) + " (reply_bytes=" +
                     std::to_string(limit) + ")";
  if (status == Status::kBadArgument) what += ": the request is answered already";
  raise_status(status, what);
  return true;
}

bool reply(Port& port, const Incoming& request, const RowArray& rows,
           const std::optional<ScaleArray>& scales, bool quantize) {
  const RowSource source = row_source(rows, scales, quantize);
  Turn turn(port);
  const Answer answer{.row_type = source.sent_type(),
                      .num_rows = source.num_rows,
                      .row_bytes = source.sent_row_bytes()};
  const uint64_t limit = port.core.params().reply_bytes;
  uint64_t scales_offset = 0, rows_offset = 0;
  const Status status = port.server.place(request.source_rank, request.source_incarnation,
                                          request.seq, answer, scales_offset, rows_offset);
  if (!settled(status, request, answer, limit)) return false;
  nb::gil_scoped_release release;
  uint8_t* base = port.core.own().base();
  copy_rows(source, nullptr, source.num_rows, reinterpret_cast<float*>(base + scales_offset),
            base + rows_offset);
  return port.server.publish(request.source_rank, request.source_incarnation, request.seq,
                             answer) == Status::kOk;
}

Answer answer_in_place(uint32_t num_rows, uint32_t row_bytes, uint32_t type) {
  if (!is_row_type(static_cast<uint16_t>(type))) throw nb::value_error("unknown row type");
  return {.row_type = static_cast<RowType>(type), .num_rows = num_rows, .row_bytes = row_bytes};
}

std::optional<std::tuple<uint64_t, uint64_t>> reply_place(Port& port, const Incoming& request,
                                                          uint32_t num_rows, uint32_t row_bytes,
                                                          uint32_t type) {
  Turn turn(port);
  const Answer answer = answer_in_place(num_rows, row_bytes, type);
  uint64_t scales = 0, rows = 0;
  const Status status = port.server.place(request.source_rank, request.source_incarnation,
                                          request.seq, answer, scales, rows);
  if (!settled(status, request, answer, port.core.params().reply_bytes)) return std::nullopt;
  return std::make_tuple(scales, rows);
}

bool commit_reply(Port& port, const Incoming& request, uint32_t num_rows, uint32_t row_bytes,
                  uint32_t type) {
  Turn turn(port);
  const Answer answer = answer_in_place(num_rows, row_bytes, type);
  const Status status = port.server.publish(request.source_rank, request.source_incarnation,
                                            request.seq, answer);
  return settled(status, request, answer, port.core.params().reply_bytes);
}

bool refuse(Port& port, const Incoming& request, uint32_t detail) {
  Turn turn(port);
  const Answer answer{.code = ReplyCode::kRefused, .detail = detail};
  const Status status = port.server.publish(request.source_rank, request.source_incarnation,
                                            request.seq, answer);
  return settled(status, request, answer, port.core.params().reply_bytes);
}

}  // namespace

void bind_rows(nb::module_& m, nb::class_<Port>& port) {
  nb::class_<Incoming>(m, "Incoming")
      .def_ro("source_rank", &Incoming::source_rank)
      .def_ro("source_incarnation", &Incoming::source_incarnation)
      .def_ro("seq", &Incoming::seq)
      .def_ro("kind", &Incoming::kind)
      .def_ro("num_rows", &Incoming::num_rows)
      .def_ro("row_bytes", &Incoming::row_bytes)
      .def_ro("num_meta", &Incoming::num_meta)
      .def_ro("reply_rows", &Incoming::reply_rows)
      .def_ro("meta_offset", &Incoming::meta_offset)
      .def_ro("scales_offset", &Incoming::scales_offset)
      .def_ro("rows_offset", &Incoming::rows_offset)
      .def_prop_ro("row_type", [](const Incoming& i) { return static_cast<int>(i.row_type); })
      .def_prop_ro("tag", [](const Incoming& i) { return tag_tuple(i.tag); });
  port.def("poll_requests", &poll, "timeout_s"_a, "max_requests"_a)
      .def("reply_rows", &reply, "request"_a, "rows"_a, "scales"_a.none() = nb::none(),
           "quantize"_a = false)
      .def("reply_place", &reply_place, "request"_a, "num_rows"_a, "row_bytes"_a, "row_type"_a)
      .def("commit_reply", &commit_reply, "request"_a, "num_rows"_a, "row_bytes"_a, "row_type"_a)
      .def("refuse_request", &refuse, "request"_a, "detail"_a)
      .def_prop_ro("num_open_requests", [](Port& p) { return p.server.num_open(); })
      .def_prop_ro("num_cancelled", [](Port& p) { return p.server.num_cancelled(); });
}

}  // namespace xds::xccl
