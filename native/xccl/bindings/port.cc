#include "port.h"

#include <cmath>

namespace xds::xccl {

void Port::attach(std::shared_ptr<Segment> segment) {
  const SegmentHeader& theirs = segment->header();
  const bool is_known = theirs.rank < core.params().max_ranks &&
                        core.is_attached(theirs.rank) &&
                        core.peer(theirs.rank).incarnation == theirs.incarnation;
  core.attach(segment);  // throws before anything changes
  if (is_known) return;
  p2p.reset(theirs.rank);
  asker.reset(theirs.rank);
  server.reset(theirs.rank);
}

namespace {

nb::object keep(const std::shared_ptr<Segment>& segment) {
  return nb::capsule(new std::shared_ptr<Segment>(segment), [](void* p) noexcept {
    delete static_cast<std::shared_ptr<Segment>*>(p);
  });
}

}  // namespace

nb::handle Port::keeper(uint32_t rank) {
  const Peer& peer = core.peer(rank);
  keepers_.resize(core.params().max_ranks);
  Keeper& keeper = keepers_[rank];
  if (keeper.incarnation != peer.incarnation) keeper = {peer.incarnation, keep(peer.segment)};
  return keeper.object;
}

nb::handle Port::own_keeper() {
  if (!own_keeper_.is_valid()) own_keeper_ = keep(core.own_segment());
  return own_keeper_;
}

void raise_error(const char* name, const std::string& message, const Ranks& ranks) {
  const nb::object type = nb::module_::import_("xdeepserve.errors").attr(name);
  const nb::object error = type(message, nb::tuple(nb::cast(ranks)));
  PyErr_SetObject(type.ptr(), error.ptr());
  throw nb::python_error();
}

void raise_status(Status status, const std::string& what, const Ranks& ranks) {
  const auto message = [&] { return what + ": " + describe(status); };
  switch (status) {
    case Status::kOk:
      return;
    case Status::kPending:
    case Status::kBusy:
    case Status::kCorrupt:
    case Status::kStale:
      raise_error("XcclError", message(), ranks);
    case Status::kTimeout:
      raise_error("XcclTimeout", message(), ranks);
    case Status::kPeerLost:
      raise_error("PeerLost", message(), ranks);
    case Status::kBadRank:
    case Status::kTooLarge:
    case Status::kBadArgument:
      throw nb::value_error(message().c_str());
  }
}

int64_t deadline_after(double timeout_s) {
  constexpr double kLongest = 1e9;  // about 30 years
  if (!(timeout_s >= 0.0 && timeout_s <= kLongest)) {
    throw nb::value_error("timeout_s must lie in [0, 1e9]");
  }
  if (timeout_s == 0.0) return 0;
  return now_ns() + static_cast<int64_t>(timeout_s * 1e9);
}

void Turn::refuse() {
  raise_error("XcclError", "a port is used by one thread at a time; give each thread its own", {});
}

Buffer::Buffer(nb::handle object, bool writable) {
  const int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
  if (PyObject_GetBuffer(object.ptr(), &view_, flags) == 0) return;
  // Arrays of several dimensions do not export a flat view; ask for any C-contiguous one.
  PyErr_Clear();
  const int shaped = PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(object.ptr(), &view_, shaped) != 0) throw nb::python_error();
}

Ranks lost_among(Port& port, std::span<const uint32_t> ranks) {
  Ranks lost;
  for (const uint32_t rank : ranks) {
    if (port.core.look(rank) != PeerState::kAlive) lost.push_back(rank);
  }
  return lost;
}

}  // namespace xds::xccl
