// A fixed set of threads that runs one job at a time. Workers spin briefly for the next job, then
// sleep on a futex, so that several processes on few cores do not starve each other. While a thread
// spins, it brings what it will read next into its cache.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace xds {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // the caller of run() counts as one of them
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }

  // Items [first, stop).
  struct Share {
    int64_t first;
    int64_t stop;
  };

  // The thread's part of `count` items that are shared out evenly, in order.
  Share share(int64_t count, int thread) const {
    return {count * thread / num_threads_, count * (thread + 1) / num_threads_};
  }

  // While `thread`, the calling one, waits in the pool, it fetches these bytes into its cache.
  void read_ahead(int thread, const uint8_t* begin, int64_t bytes) {
    seats_[static_cast<size_t>(thread)].ahead = {begin, begin + bytes};
  }

  // body(thread) once on each of size() threads; returns when all are done. `body` must not throw.
  template <class Body>
  void run(Body&& body) {
    auto call = [](void* context, int thread) { (*static_cast<Body*>(context))(thread); };
    run_erased(call, &body);
  }

  // body(item, thread) for each item in [0, count). Free threads take the next item, so that
  // unequal items balance; who computes an item must not matter to its result.
  template <class Body>
  void for_each(int64_t count, Body&& body) {
    if (count <= 1 || num_threads_ == 1) {
      for (int64_t i = 0; i < count; ++i) body(i, 0);
      return;
    }
    std::atomic<int64_t> next{0};
    run([&](int thread) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i, thread);
    });
  }

  // The same for items that lie in memory one after the other: each thread goes through its own
  // share in order, then takes the last items of the others. At most 2^31 items.
  template <class Body>
  void for_each_in_shares(int64_t count, Body&& body) {
    if (count <= 1 || num_threads_ == 1) {
      for (int64_t i = 0; i < count; ++i) body(i, 0);
      return;
    }
    for (int thread = 0; thread < num_threads_; ++thread) open_share(count, thread);
    run([&](int thread) {
      for (int64_t i; (i = take_first(thread)) != kNone;) body(i, thread);
      for (int step = 1; step < num_threads_; ++step) {
        const int other = (thread + step) % num_threads_;
        for (int64_t i; (i = take_last(other)) != kNone;) body(i, thread);
      }
    });
  }

 private:
  static constexpr int64_t kNone = -1;

  struct Ahead {
    const uint8_t* next = nullptr;
    const uint8_t* stop = nullptr;
  };

  // What belongs to one thread.
  struct alignas(64) Seat {
    std::atomic<uint64_t> left{0};  // of its share: first item, and above it the end
    Ahead ahead;                    // only the thread itself looks at it
  };

  void open_share(int64_t count, int thread);
  int64_t take_first(int thread);  // of the thread's share; kNone: it is empty
  int64_t take_last(int thread);
  uint32_t wait_change(const std::atomic<uint32_t>& value, uint32_t old, int thread);

  using Job = void (*)(void* context, int thread);

  void run_erased(Job job, void* context);
  void work(int thread);

  const int num_threads_;
  std::vector<Seat> seats_;
  Job job_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts jobs; a change wakes the workers
  alignas(64) std::atomic<uint32_t> pending_{0};  // workers that have not finished the job
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace xds
