#include "thread_pool.h"

namespace xds {
namespace {

constexpr int kSpins = 2000;  // about 25 us: longer than the gaps inside a step, shorter than idle

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Fetches some lines; false: nothing is left.
template <class Ahead>
bool fetch_some(Ahead& ahead) {
  constexpr int kLines = 8;  // about the time of one look at the value waited for
  if (ahead.next >= ahead.stop) return false;
  for (int line = 0; line < kLines; ++line, ahead.next += 64) {
    __builtin_prefetch(ahead.next, 0, 2);
  }
  return true;
}

constexpr uint64_t kOneLess = uint64_t{1} << 32;  // of a share's end

uint64_t first_of(uint64_t left) { return left & (kOneLess - 1); }
uint64_t end_of(uint64_t left) { return left >> 32; }

}  // namespace

void ThreadPool::open_share(int64_t count, int thread) {
  const Share all = share(count, thread);
  const uint64_t left = static_cast<uint64_t>(all.stop) << 32 | static_cast<uint64_t>(all.first);
  seats_[static_cast<size_t>(thread)].left.store(left, std::memory_order_relaxed);
}

int64_t ThreadPool::take_first(int thread) {
  std::atomic<uint64_t>& left = seats_[static_cast<size_t>(thread)].left;
  for (uint64_t now = left.load(std::memory_order_relaxed); first_of(now) < end_of(now);) {
    if (left.compare_exchange_weak(now, now + 1, std::memory_order_relaxed)) {
      return static_cast<int64_t>(first_of(now));
    }
  }
  return kNone;
}

int64_t ThreadPool::take_last(int thread) {
  std::atomic<uint64_t>& left = seats_[static_cast<size_t>(thread)].left;
  for (uint64_t now = left.load(std::memory_order_relaxed); first_of(now) < end_of(now);) {
    if (left.compare_exchange_weak(now, now - kOneLess, std::memory_order_relaxed)) {
      return static_cast<int64_t>(end_of(now)) - 1;
    }
  }
  return kNone;
}

// Wait until `value` differs from `old`; returns what it became.
uint32_t ThreadPool::wait_change(const std::atomic<uint32_t>& value, uint32_t old, int thread) {
  Ahead& ahead = seats_[static_cast<size_t>(thread)].ahead;
  for (int spin = 0; spin < kSpins;) {
    const uint32_t now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    if (fetch_some(ahead)) continue;
    pause_briefly();
    ++spin;
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), seats_(static_cast<size_t>(num_threads)) {
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run_erased(Job job, void* context) {
  job_ = job;
  context_ = context;
  pending_.store(static_cast<uint32_t>(num_threads_ - 1), std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  job(context, 0);
  for (uint32_t left; (left = pending_.load(std::memory_order_acquire)) != 0;) {
    wait_change(pending_, left, 0);
  }
}

void ThreadPool::work(int thread) {
  for (uint32_t seen = 0;;) {
    seen = wait_change(epoch_, seen, thread);
    if (stop_.load(std::memory_order_relaxed)) return;
    job_(context_, thread);
    if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_all();
  }
}

}  // namespace xds
