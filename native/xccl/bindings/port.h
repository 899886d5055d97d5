// One rank as seen from Python: the core and its primitives, a guard against use by two threads at
// once, waits that release the GIL and notice Ctrl-C, and errors as the package's own types.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../asker.h"
#include "../core.h"
#include "../exchange.h"
#include "../p2p.h"
#include "../server.h"
#include "../trace.h"
#include "../window.h"

namespace xds::xccl {

namespace nb = nanobind;

struct Port {
  Port(std::shared_ptr<Segment> own, int64_t frozen_after_ns)
      : core(std::move(own), frozen_after_ns),
        p2p(core, trace),
        window(core, trace),
        asker(core, trace),
        server(core, trace) {}

  void attach(std::shared_ptr<Segment> segment);
  // Python objects that keep a segment mapped while views of it live: an attached peer's, our own.
  nb::handle keeper(uint32_t rank);
  nb::handle own_keeper();

  Trace trace;
  Core core;
  P2p p2p;
  Window window;
  Asker asker;
  Server server;
  std::vector<std::unique_ptr<Exchange>> idle_exchanges;  // keep their buffers
  std::atomic_flag is_busy = ATOMIC_FLAG_INIT;

 private:
  struct Keeper {
    uint64_t incarnation = 0;
    nb::object object;
  };
  std::vector<Keeper> keepers_;
  nb::object own_keeper_;
};

using Ranks = std::vector<uint32_t>;

// Raises xdeepserve.errors.<name>(message, ranks).
[[noreturn]] void raise_error(const char* name, const std::string& message, const Ranks& ranks);
// Raises the error of a status, prefixed by what was attempted; returns on kOk.
void raise_status(Status status, const std::string& what, const Ranks& ranks = {});

// Seconds to an absolute deadline; ValueError when negative or not a number.
int64_t deadline_after(double timeout_s);

// Holds the port for one call, which is a heartbeat.
class Turn {
 public:
  explicit Turn(Port& port) : port_(port) {
    if (port.is_busy.test_and_set(std::memory_order_acquire)) refuse();
    port.core.beat();
  }
  ~Turn() { port_.is_busy.clear(std::memory_order_release); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  [[noreturn]] static void refuse();
  Port& port_;
};

// A bytes-like object, C-contiguous, of any item type.
class Buffer {
 public:
  Buffer(nb::handle object, bool writable);
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
  uint64_t size() const { return static_cast<uint64_t>(view_.len); }

 private:
  Py_buffer view_;
};

// Waits without the GIL, in slices after which signals are handled.
template <class Ready, class Owed>
Status wait_released(Port& port, Ready&& ready, double timeout_s, Owed&& owed) {
  constexpr int64_t kSliceNs = 100'000'000;
  const int64_t deadline = deadline_after(timeout_s);
  int64_t slice_end = std::min(deadline, now_ns() + kSliceNs);
  for (;;) {
    Status status;
    {
      nb::gil_scoped_release release;
      status = port.core.wait(ready, slice_end, owed);
    }
    if (status != Status::kTimeout || slice_end >= deadline) return status;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    slice_end = std::min(deadline, now_ns() + kSliceNs);
  }
}

// Lets other Python threads run while many bytes are copied. To give the GIL away and to get it back
// takes longer than to copy a few.
class LongCopy {
 public:
  static constexpr uint64_t kFewBytes = 64 << 10;

  explicit LongCopy(uint64_t bytes) {
    if (bytes > kFewBytes) released_.emplace();
  }

 private:
  std::optional<nb::gil_scoped_release> released_;
};

// Whether it is ready now; `bytes` are copied meanwhile, beside what is pushed.
template <class Ready>
bool is_ready_now(Port& port, Ready&& ready, uint64_t bytes = 0) {
  const LongCopy copy(bytes + port.p2p.pushable_bytes());
  return ready();
}

// A wait of no time: kTimeout when it is not ready.
template <class Ready, class Owed>
Status ask_once(Port& port, Ready&& ready, Owed&& owed, uint64_t bytes = 0) {
  const LongCopy copy(bytes + port.p2p.pushable_bytes());
  return port.core.wait(ready, 0, owed);
}

// Those of `ranks` that are not alive.
Ranks lost_among(Port& port, std::span<const uint32_t> ranks);

void bind_p2p(nb::module_& m, nb::class_<Port>& port);
void bind_ceiling(nb::module_& m);
void bind_window(nb::class_<Port>& port);
void bind_batch(nb::module_& m, nb::class_<Port>& port);
void bind_exchange(nb::module_& m, nb::class_<Port>& port);
void bind_ep_group(nb::module_& m);

}  // namespace xds::xccl
