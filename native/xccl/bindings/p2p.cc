// send, recv and their asynchronous and lending forms.
#include "port.h"

namespace xds::xccl {

using namespace nb::literals;

namespace {

std::string rank_text(const char* verb, uint32_t rank) {
  return std::string(verb) + " rank " + std::to_string(rank);
}

void check_attached(Port& port, uint32_t rank, const char* verb) {
  if (!port.core.is_attached(rank)) raise_status(Status::kBadRank, rank_text(verb, rank));
}

// Raises after a failed wait for one rank.
void raise_wait(Port& port, Status status, const char* verb, uint32_t rank) {
  if (status == Status::kOk) return;
  if (status == Status::kPeerLost) {
    const bool is_dead = port.core.is_gone(rank);
    raise_error("PeerLost", rank_text(verb, rank) + (is_dead ? ": it is dead" : ": it is frozen"),
                {rank});
  }
  raise_status(status, rank_text(verb, rank), {rank});
}

template <class Ready>
Status wait_for(Port& port, uint32_t rank, double timeout_s, Ready&& ready) {
  return wait_released(port, ready, timeout_s, [&] { return std::span<const uint32_t>(&rank, 1); });
}

template <class Ready>
Status ask_for(Port& port, uint32_t rank, Ready&& ready, uint64_t bytes = 0) {
  return ask_once(port, ready, [&] { return std::span<const uint32_t>(&rank, 1); }, bytes);
}

// Whether the message to a rank is in the ring, after pushing what can be pushed.
auto push_out(Port& port, uint32_t to) {
  return [&port, to] {
    port.p2p.push_all();
    return !port.p2p.is_sending(to);
  };
}

void finish_send(Port& port, uint32_t to, double timeout_s) {
  raise_wait(port, wait_for(port, to, timeout_s, push_out(port, to)), "send to", to);
}

void send(Port& port, uint32_t to, nb::handle data, uint32_t tag, double timeout_s) {
  const Buffer buffer(data, false);
  Turn turn(port);
  raise_status(port.p2p.begin_send(to, buffer.data(), buffer.size(), tag), rank_text("send to", to));
  if (buffer.size() <= kPage && port.p2p.push(to) == Status::kOk) return;
  try {
    finish_send(port, to, timeout_s);
  } catch (...) {
    port.p2p.abandon_send(to);
    throw;
  }
}

// A message on its way; the buffer is held until it is in the ring.
class SendHandle {
 public:
  SendHandle(nb::object port, uint32_t to, nb::object data, uint32_t tag)
      : owner_(std::move(port)), port_(nb::cast<Port&>(owner_)), to_(to), data_(std::move(data)) {
    buffer_ = std::make_unique<Buffer>(data_, false);
    Turn turn(port_);
    raise_status(port_.p2p.begin_send(to, buffer_->data(), buffer_->size(), tag),
                 rank_text("send to", to));
    incarnation_ = port_.core.peer(to).incarnation;
    serial_ = port_.p2p.serial(to);
    const LongCopy copy(port_.p2p.pushable_bytes());
    port_.p2p.push(to);
  }
  ~SendHandle() {
    if (is_current()) port_.p2p.abandon_send(to_);
  }

  bool test() {
    Turn turn(port_);
    if (is_current()) {
      const Status status = ask_for(port_, to_, push_out(port_, to_));
      if (status == Status::kPeerLost) raise_wait(port_, status, "send to", to_);
    }
    return settle();
  }
  void wait(double timeout_s) {
    Turn turn(port_);
    if (is_current()) finish_send(port_, to_, timeout_s);
    settle();
  }

 private:
  bool is_current() const {
    return buffer_ && port_.p2p.is_sending(to_, serial_);
  }
  bool settle() {
    if (!buffer_) return true;
    if (port_.core.peer(to_).incarnation != incarnation_) {
      buffer_.reset();
      raise_error("PeerLost", rank_text("send to", to_) + ": it has a new life", {to_});
    }
    if (port_.p2p.is_sending(to_, serial_)) return false;
    buffer_.reset();
    return true;
  }

  nb::object owner_;
  Port& port_;
  uint32_t to_;
  uint64_t incarnation_ = 0;
  uint64_t serial_ = 0;
  nb::object data_;
  std::unique_ptr<Buffer> buffer_;
};

void raise_recv(Port& port, Status status, uint32_t from, const RecvState& state, uint64_t room) {
  if (status == Status::kTooLarge) {
    throw nb::value_error(("recv from rank " + std::to_string(from) + ": the message has " +
                           std::to_string(state.total) + " bytes, the buffer " +
                           std::to_string(room) + "; receive it into a larger one")
                              .c_str());
  }
  raise_wait(port, status, "recv from", from);
}

// Whether a pull has ended, with its status in `pulled`.
auto pull_in(Port& port, uint32_t from, const Buffer& buffer, RecvState& state, Status& pulled) {
  return [&, from] {
    port.p2p.push_all();
    pulled = port.p2p.pull(from, buffer.data(), buffer.size(), state);
    return pulled != Status::kPending;
  };
}

Status pull_until(Port& port, uint32_t from, const Buffer& buffer, RecvState& state,
                  double timeout_s) {
  Status pulled = Status::kPending;
  const Status status =
      wait_for(port, from, timeout_s, pull_in(port, from, buffer, state, pulled));
  return status == Status::kOk ? pulled : status;
}

std::tuple<uint64_t, uint32_t> recv(Port& port, uint32_t from, nb::handle out, double timeout_s) {
  const Buffer buffer(out, true);
  Turn turn(port);
  check_attached(port, from, "recv from");
  RecvState state;
  state.enqueue_ns = port.trace.stamp();
  const Status status = pull_until(port, from, buffer, state, timeout_s);
  raise_recv(port, status, from, state, buffer.size());
  return {state.total, state.tag};
}

// A message expected into a buffer.
class RecvHandle {
 public:
  RecvHandle(nb::object port, uint32_t from, nb::object out)
      : owner_(std::move(port)), port_(nb::cast<Port&>(owner_)), from_(from), out_(std::move(out)) {
    buffer_ = std::make_unique<Buffer>(out_, true);
    check_attached(port_, from, "recv from");
    incarnation_ = port_.core.peer(from).incarnation;
    state_.enqueue_ns = port_.trace.stamp();
  }

  bool test() {
    Turn turn(port_);
    if (is_done_) {
      port_.p2p.push_all();
      return true;
    }
    check_life();
    Status pulled = Status::kPending;
    const Status status = ask_for(port_, from_, pull_in(port_, from_, *buffer_, state_, pulled),
                                  port_.p2p.pullable_bytes(from_));
    if (status != Status::kTimeout) settle(status == Status::kOk ? pulled : status);
    return is_done_;
  }
  std::tuple<uint64_t, uint32_t> wait(double timeout_s) {
    Turn turn(port_);
    if (!is_done_) {
      check_life();
      settle(pull_until(port_, from_, *buffer_, state_, timeout_s));
    }
    return {state_.total, state_.tag};
  }

 private:
  void check_life() const {
    if (port_.core.peer(from_).incarnation == incarnation_) return;
    raise_error("PeerLost", rank_text("recv from", from_) + ": it has a new life", {from_});
  }
  void settle(Status status) {
    raise_recv(port_, status, from_, state_, buffer_->size());
    is_done_ = true;
  }

  nb::object owner_;
  Port& port_;
  uint32_t from_;
  uint64_t incarnation_ = 0;
  nb::object out_;
  std::unique_ptr<Buffer> buffer_;
  RecvState state_;
  bool is_done_ = false;
};

using ChunkArray = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;

nb::tuple lend(Port& port, uint32_t from, double timeout_s) {
  Turn turn(port);
  check_attached(port, from, "recv from");
  ChunkView view{};
  Status lent = Status::kPending;
  const Status status = wait_for(port, from, timeout_s, [&] {
    port.p2p.push_all();
    lent = port.p2p.lend(from, view);
    return lent != Status::kPending;
  });
  raise_wait(port, status == Status::kOk ? lent : status, "recv from", from);
  auto* keep = new std::shared_ptr<Segment>(port.core.peer(from).segment);
  nb::capsule owner(keep, [](void* p) noexcept { delete static_cast<std::shared_ptr<Segment>*>(p); });
  const ChunkArray data(view.data, {view.bytes}, owner);
  return nb::make_tuple(data, view.chunk_idx, view.num_chunks, view.tag, view.total_bytes);
}

void give_back(Port& port, uint32_t from) {
  Turn turn(port);
  check_attached(port, from, "release of");
  raise_status(port.p2p.give_back(from), rank_text("nothing is lent by", from));
}

void flush(Port& port, uint32_t to, double timeout_s) {
  Turn turn(port);
  check_attached(port, to, "flush to");
  const Status status =
      wait_for(port, to, timeout_s, [&] { return port.p2p.is_drained(to) == Status::kOk; });
  raise_wait(port, status, "flush to", to);
}

}  // namespace

void bind_p2p(nb::module_& m, nb::class_<Port>& port) {
  port.def("send", &send, "to"_a, "data"_a, "tag"_a = 0, "timeout_s"_a = 30.0)
      .def("recv", &recv, "from_rank"_a, "out"_a, "timeout_s"_a = 30.0)
      .def("lend", &lend, "from_rank"_a, "timeout_s"_a = 30.0)
      .def("give_back", &give_back, "from_rank"_a)
      .def("flush", &flush, "to"_a, "timeout_s"_a = 30.0);
  nb::class_<SendHandle>(m, "SendHandle")
      .def(nb::init<nb::object, uint32_t, nb::object, uint32_t>(), "port"_a, "to"_a, "data"_a,
           "tag"_a = 0)
      .def("test", &SendHandle::test)
      .def("wait", &SendHandle::wait, "timeout_s"_a = 30.0);
  nb::class_<RecvHandle>(m, "RecvHandle")
      .def(nb::init<nb::object, uint32_t, nb::object>(), "port"_a, "from_rank"_a, "out"_a)
      .def("test", &RecvHandle::test)
      .def("wait", &RecvHandle::wait, "timeout_s"_a = 30.0);
}

}  // namespace xds::xccl
