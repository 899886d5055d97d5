// Memory semantics: every rank offers a window that any rank may write, read and signal in.
//
//   put(rank, offset, data)               store bytes in the window of `rank`
//   signal(rank, offset, value)           release-store a u64 there after all puts before it; wake
//   add(rank, offset, value)              the same with an atomic addition
//   wait: until the u64 at an offset of the own window is >= value
//   get(rank, offset, out)                load bytes
//
// Who may write where and when is the callers' agreement, as with any shared memory: a window has no
// epochs. It dies with the life of its rank; a late put of a replaced peer lands in this window if it
// is still attached there, so words that must survive failover carry an epoch of their own.
#pragma once

#include "core.h"
#include "trace.h"

namespace xds::xccl {

class Window {
 public:
  Window(Core& core, Trace& trace) : core_(core), trace_(trace) {}

  Status put(uint32_t rank, uint64_t offset, const uint8_t* data, uint64_t bytes);
  Status get(uint32_t rank, uint64_t offset, uint8_t* out, uint64_t bytes);
  Status signal(uint32_t rank, uint64_t offset, uint64_t value);
  Status add(uint32_t rank, uint64_t offset, uint64_t value);
  // The word a wait looks at; null when the offset is out of range or not a multiple of 8.
  const uint64_t* own_word(uint64_t offset);

 private:
  uint64_t* word(uint32_t rank, uint64_t offset);
  Status check(uint32_t rank, uint64_t offset, uint64_t bytes);
  void record(TraceKind kind, uint32_t rank, uint64_t offset, uint64_t bytes, int64_t enqueue_ns);

  Core& core_;
  Trace& trace_;
};

}  // namespace xds::xccl
