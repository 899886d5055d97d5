// Records of transfers, in memory of the process; the oldest are overwritten. Off unless opened.
#pragma once

#include <cstdint>
#include <vector>

#include "atomics.h"

namespace xds::xccl {

enum class TraceKind : uint32_t {
  kSend = 0,
  kRecv = 1,
  kRequest = 2,  // enqueue: post called; visible: published; done: answer read
  kServe = 3,    // enqueue: published by the asker; visible: seen here; done: answer published
  kPut = 4,      // these four: tag: offset in the window; visible = done: the call ended
  kGet = 5,
  kSignal = 6,
  kAdd = 7,
};

struct TraceRecord {
  TraceKind kind;
  uint32_t peer;
  uint64_t tag;  // p2p: the tag; rows: step_idx; windows: the offset
  uint32_t layer_idx;
  uint32_t microbatch_idx;
  uint64_t bytes;
  int64_t enqueue_ns, visible_ns, done_ns;  // CLOCK_MONOTONIC, comparable between processes
};

class Trace {
 public:
  void open(uint64_t capacity) {
    records_.assign(capacity, {});
    count_ = 0;
  }
  bool is_open() const { return !records_.empty(); }
  // 0 when closed, so that an idle trace reads no clock.
  int64_t stamp() const { return is_open() ? now_ns() : 0; }
  void add(const TraceRecord& record) {
    if (is_open()) records_[count_++ % records_.size()] = record;
  }
  // Hands out what is there, oldest first, and forgets it.
  std::vector<TraceRecord> take() {
    std::vector<TraceRecord> taken;
    const uint64_t size = records_.size();
    const uint64_t first = count_ > size ? count_ - size : 0;
    for (uint64_t i = first; i < count_; ++i) taken.push_back(records_[i % size]);
    count_ = 0;
    return taken;
  }

 private:
  std::vector<TraceRecord> records_;
  uint64_t count_ = 0;
};

}  // namespace xds::xccl
