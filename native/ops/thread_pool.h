// A fixed set of threads that runs one job at a time. Workers spin briefly for the next job, then
// sleep on a futex, so that several processes on few cores do not starve each other.
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

 private:
  using Job = void (*)(void* context, int thread);

  void run_erased(Job job, void* context);
  void work(int thread);

  const int num_threads_;
  Job job_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts jobs; a change wakes the workers
  alignas(64) std::atomic<uint32_t> pending_{0};  // workers that have not finished the job
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace xds
