// Words that several processes see. Every shared word has exactly one writer (the doorbell, which
// only counts up, is the exception), so a process killed between any two instructions leaves words
// that are old or new, never torn, and nothing locked.
#pragma once

#include <time.h>

#include <atomic>
#include <cstdint>

namespace xds::xccl {

inline constexpr uint64_t kLine = 64;    // bytes of a cache line
inline constexpr uint64_t kPage = 4096;  // areas start on pages

// Peers' segments are mapped read-only; an atomic load does not write.
template <class T>
T load_acquire(const T& word) {
  return std::atomic_ref<T>(const_cast<T&>(word)).load(std::memory_order_acquire);
}

template <class T>
T load_relaxed(const T& word) {
  return std::atomic_ref<T>(const_cast<T&>(word)).load(std::memory_order_relaxed);
}

template <class T>
void store_release(T& word, T value) {
  std::atomic_ref<T>(word).store(value, std::memory_order_release);
}

template <class T>
void store_relaxed(T& word, T value) {
  std::atomic_ref<T>(word).store(value, std::memory_order_relaxed);
}

// Orders "I published" before "is the other asleep?", and "I am asleep" before "is there news?":
// one of the two sides always sees the other.
inline void full_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

}  // namespace xds::xccl
