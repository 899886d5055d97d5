#include "window.h"

#include "copy.h"

namespace xds::xccl {

Status Window::check(uint32_t rank, uint64_t offset, uint64_t bytes) {
  if (!core_.is_attached(rank)) return Status::kBadRank;
  return fits(offset, bytes, core_.params().window_bytes) ? Status::kOk : Status::kBadArgument;
}

uint64_t* Window::word(uint32_t rank, uint64_t offset) {
  if (offset % 8 != 0 || !fits(offset, 8, core_.params().window_bytes)) return nullptr;
  return reinterpret_cast<uint64_t*>(core_.peer(rank).segment->window() + offset);
}

const uint64_t* Window::own_word(uint64_t offset) {
  if (offset % 8 != 0 || !fits(offset, 8, core_.params().window_bytes)) return nullptr;
  return reinterpret_cast<const uint64_t*>(core_.own().window() + offset);
}

void Window::record(TraceKind kind, uint32_t rank, uint64_t offset, uint64_t bytes,
                    int64_t enqueue_ns) {
  if (!trace_.is_open()) return;
  const int64_t now = now_ns();
  trace_.add({kind, rank, offset, 0, 0, bytes, enqueue_ns, now, now});
}

Status Window::put(uint32_t rank, uint64_t offset, const uint8_t* data, uint64_t bytes) {
  if (const Status status = check(rank, offset, bytes); status != Status::kOk) return status;
  const int64_t enqueue_ns = trace_.stamp();
  copy_bytes(core_.peer(rank).segment->window() + offset, data, bytes, bytes);
  fault_point(FaultPoint::kPutCopied);
  record(TraceKind::kPut, rank, offset, bytes, enqueue_ns);
  return Status::kOk;
}

Status Window::get(uint32_t rank, uint64_t offset, uint8_t* out, uint64_t bytes) {
  if (const Status status = check(rank, offset, bytes); status != Status::kOk) return status;
  const int64_t enqueue_ns = trace_.stamp();
  copy_bytes(out, core_.peer(rank).segment->window() + offset, bytes, bytes);
  record(TraceKind::kGet, rank, offset, bytes, enqueue_ns);
  return Status::kOk;
}

Status Window::signal(uint32_t rank, uint64_t offset, uint64_t value) {
  if (!core_.is_attached(rank)) return Status::kBadRank;
  uint64_t* target = word(rank, offset);
  if (target == nullptr) return Status::kBadArgument;
  const int64_t enqueue_ns = trace_.stamp();
  store_release(*target, value);
  core_.wake(rank);
  record(TraceKind::kSignal, rank, offset, sizeof value, enqueue_ns);
  return Status::kOk;
}

Status Window::add(uint32_t rank, uint64_t offset, uint64_t value) {
  if (!core_.is_attached(rank)) return Status::kBadRank;
  uint64_t* target = word(rank, offset);
  if (target == nullptr) return Status::kBadArgument;
  const int64_t enqueue_ns = trace_.stamp();
  std::atomic_ref<uint64_t>(*target).fetch_add(value, std::memory_order_acq_rel);
  core_.wake(rank);
  record(TraceKind::kAdd, rank, offset, sizeof value, enqueue_ns);
  return Status::kOk;
}

}  // namespace xds::xccl
