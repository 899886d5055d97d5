// put, get, signal, add and wait on windows; the window as an array.
#include "port.h"

namespace xds::xccl {

using namespace nb::literals;

namespace {

std::string place_text(const char* verb, uint32_t rank, uint64_t offset, uint64_t bytes,
                       uint64_t limit) {
  return std::string(verb) + " of " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(offset) + " of rank " + std::to_string(rank) + " (window_bytes=" +
         std::to_string(limit) + ")";
}

void raise_place(Port& port, Status status, const char* verb, uint32_t rank, uint64_t offset,
                 uint64_t bytes) {
  if (status == Status::kOk) return;
  raise_status(status, place_text(verb, rank, offset, bytes, port.core.params().window_bytes));
}

void put(Port& port, uint32_t rank, uint64_t offset, nb::handle data) {
  const Buffer buffer(data, false);
  Turn turn(port);
  Status status;
  {
    const LongCopy copy(buffer.size());
    status = port.window.put(rank, offset, buffer.data(), buffer.size());
  }
  raise_place(port, status, "put", rank, offset, buffer.size());
}

void get(Port& port, uint32_t rank, uint64_t offset, nb::handle out) {
  const Buffer buffer(out, true);
  Turn turn(port);
  Status status;
  {
    const LongCopy copy(buffer.size());
    status = port.window.get(rank, offset, buffer.data(), buffer.size());
  }
  raise_place(port, status, "get", rank, offset, buffer.size());
}

void signal(Port& port, uint32_t rank, uint64_t offset, uint64_t value) {
  Turn turn(port);
  raise_place(port, port.window.signal(rank, offset, value), "signal", rank, offset, 8);
}

void add(Port& port, uint32_t rank, uint64_t offset, uint64_t value) {
  Turn turn(port);
  raise_place(port, port.window.add(rank, offset, value), "add", rank, offset, 8);
}

uint64_t wait_signal(Port& port, uint64_t offset, uint64_t at_least, double timeout_s,
                     const Ranks& owed) {
  Turn turn(port);
  const uint64_t* word = port.window.own_word(offset);
  if (word == nullptr) {
    raise_place(port, Status::kBadArgument, "wait", port.core.rank(), offset, 8);
  }
  for (const uint32_t rank : owed) {
    if (!port.core.is_attached(rank)) {
      raise_status(Status::kBadRank, "wait for rank " + std::to_string(rank));
    }
  }
  const Status status = wait_released(
      port,
      [&] {
        port.p2p.push_all();
        return load_acquire(*word) >= at_least;
      },
      timeout_s, [&] { return std::span<const uint32_t>(owed); });
  if (status == Status::kPeerLost) {
    raise_status(status, "wait for a signal", lost_among(port, owed));
  }
  raise_status(status, "wait for a signal of at least " + std::to_string(at_least), owed);
  return load_acquire(*word);
}

}  // namespace

void bind_window(nb::class_<Port>& port) {
  port.def("put", &put, "rank"_a, "offset"_a, "data"_a)
      .def("get", &get, "rank"_a, "offset"_a, "out"_a)
      .def("signal", &signal, "rank"_a, "offset"_a, "value"_a)
      .def("add", &add, "rank"_a, "offset"_a, "value"_a)
      .def("wait_signal", &wait_signal, "offset"_a, "at_least"_a, "timeout_s"_a = 30.0,
           "owed"_a = Ranks{});
}

}  // namespace xds::xccl
