#include "liveness.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace xds::xccl {
namespace {

constexpr int64_t kProcessEveryNs = 10'000'000;
constexpr int64_t kMostPerLookNs = 50'000'000;  // of silence; more means that we were away

}  // namespace

uint64_t process_start(int32_t pid) {
  char path[32];
  std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  char text[1024];
  const ssize_t size = ::read(fd, text, sizeof text - 1);
  ::close(fd);
  if (size <= 0) return 0;
  text[size] = 0;
  const char* at = std::strrchr(text, ')');  // the name before it may hold anything
  if (at == nullptr || at[1] == 0 || at[2] == 0) return 0;
  const char state = at[2];
  if (state == 'Z' || state == 'X' || state == 'x') return 0;
  // After the name: state is field 3, the start time field 22.
  for (int field = 3; field < 22 && at != nullptr; ++field) {
    at = std::strchr(at + (field == 3 ? 2 : 1), ' ');
  }
  return at == nullptr ? 0 : std::strtoull(at, nullptr, 10);
}

void Pulse::reset(int64_t now) {
  *this = Pulse();
  state_ = PeerState::kAlive;
  looked_ns_ = now;
  process_ns_ = now - kProcessEveryNs;
}

PeerState Pulse::look(const Segment& segment, int64_t now, int64_t frozen_after_ns) {
  if (state_ == PeerState::kAbsent || state_ == PeerState::kDead) return state_;
  if (segment.state() == SegmentState::kClosed) return state_ = PeerState::kDead;
  if (now - process_ns_ >= kProcessEveryNs) {
    process_ns_ = now;
    const SegmentHeader& header = segment.header();
    if (process_start(header.pid) != header.pid_start) return state_ = PeerState::kDead;
  }
  const uint64_t heartbeat = load_relaxed(segment.live().heartbeat);
  if (heartbeat != heartbeat_) {
    heartbeat_ = heartbeat;
    silence_ns_ = 0;
  } else {
    silence_ns_ += std::min(now - looked_ns_, kMostPerLookNs);
  }
  looked_ns_ = now;
  state_ = silence_ns_ < frozen_after_ns ? PeerState::kAlive : PeerState::kFrozen;
  return state_;
}

}  // namespace xds::xccl
