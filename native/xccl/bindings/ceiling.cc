// The ceiling of any message: how long a cache line takes to another core and back.
#include <pthread.h>
#include <sched.h>

#include <thread>

#include "port.h"

namespace xds::xccl {

using namespace nb::literals;

namespace {

struct alignas(128) Word {
  uint64_t value = 0;
};

void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<size_t>(cpu), &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

// Spins without pause; yields now and then, so that two threads on one core still end.
void await(const uint64_t& word, uint64_t value) {
  for (uint32_t spins = 0; load_acquire(word) != value; ++spins) {
    if (spins % 4096 == 4095) sched_yield();
  }
}

// Seconds per round trip between threads on two cores, best of `repeats` runs of `rounds`.
double cache_line_round_trip(int cpu_a, int cpu_b, uint64_t rounds, int repeats) {
  if (cpu_a < 0 || cpu_b < 0 || cpu_a >= CPU_SETSIZE || cpu_b >= CPU_SETSIZE || rounds == 0) {
    throw nb::value_error("cpus must be numbers of cores, rounds at least 1");
  }
  nb::gil_scoped_release release;
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    Word there, back;
    std::thread echo([&] {
      pin(cpu_b);
      for (uint64_t n = 1; n <= rounds; ++n) {
        await(there.value, n);
        store_release(back.value, n);
      }
    });
    std::thread caller([&] {
      pin(cpu_a);
      const int64_t start = now_ns();
      for (uint64_t n = 1; n <= rounds; ++n) {
        store_release(there.value, n);
        await(back.value, n);
      }
      best = std::min(best, static_cast<double>(now_ns() - start) * 1e-9 / rounds);
    });
    caller.join();
    echo.join();
  }
  return best;
}

}  // namespace

void bind_ceiling(nb::module_& m) {
  m.def("cache_line_round_trip", &cache_line_round_trip, "cpu_a"_a, "cpu_b"_a, "rounds"_a = 20000,
        "repeats"_a = 5);
}

}  // namespace xds::xccl
