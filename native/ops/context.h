// What one backend object owns: its kernels, its threads, its scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"
#include "op_times.h"
#include "succession.h"
#include "thread_pool.h"

namespace xds {

// Memory that grows and is reused; the contents do not survive a later, larger request.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + kAlign;
    if (bytes > size_) {
      memory_.reset();  // before the new one, so that both never exist at once
      size_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlign})));
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  size_t size_ = 0;
};

struct Context {
  Context(const Kernels& table, int num_threads)
      : kernels(table), pool(num_threads), thread_scratch(static_cast<size_t>(num_threads)) {}

  const Kernels& kernels;
  ThreadPool pool;
  std::mutex mutex;  // one operator at a time
  Scratch activations;
  Scratch row_scales;
  Scratch hidden;
  Scratch rows;
  Scratch stack;        // between the layers of stack.cc
  Scratch layer;        // between the operators of layer.cc
  Scratch permutation;
  std::vector<Scratch> thread_scratch;
  OpTimes times;
  Succession succession;
  std::vector<uint32_t> id_counts;  // of a vocabulary; all zero between operators
};

}  // namespace xds
