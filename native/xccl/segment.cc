#include "segment.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "fault.h"
#include "liveness.h"
#include "status.h"

namespace xds::xccl {
namespace {

constexpr const char* kFolder = "/dev/shm";

[[noreturn]] void fail(const std::string& what, const std::string& path) {
  throw SegmentFault(what + " " + path + ": " + std::strerror(errno));
}

class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

std::string path_of(const SegmentHeader& header) {
  return kFolder + segment_name(header.run_id, header.name);
}

// Segments of this process, so that ranks that are threads share one mapping.
std::mutex registry_mutex;
std::map<std::pair<std::string, uint64_t>, std::weak_ptr<Segment>>& registry() {
  static auto* segments = new std::map<std::pair<std::string, uint64_t>, std::weak_ptr<Segment>>;
  return *segments;
}

void remember_own(const std::string& path, const std::shared_ptr<Segment>& segment) {
  std::lock_guard lock(registry_mutex);
  std::erase_if(registry(), [](const auto& item) { return item.second.expired(); });
  registry()[{path, segment->header().incarnation}] = segment;
}

std::shared_ptr<Segment> find_own(const SegmentHeader& header) {
  if (header.pid != getpid()) return nullptr;
  std::lock_guard lock(registry_mutex);
  const auto found = registry().find({path_of(header), header.incarnation});
  return found == registry().end() ? nullptr : found->second.lock();
}

void check_room(uint64_t bytes) {
  struct statvfs room;
  if (statvfs(kFolder, &room) != 0) fail("cannot look at", kFolder);
  const uint64_t free_bytes = uint64_t{room.f_bavail} * room.f_frsize;
  if (bytes <= free_bytes) return;
  throw SegmentFault("a segment of " + std::to_string(bytes >> 20) + " MiB does not fit the " +
                     std::to_string(free_bytes >> 20) +
                     " MiB left in /dev/shm; make it larger or lower request_bytes, reply_bytes "
                     "or max_ranks");
}

// By the clock that is never set: /dev/shm does not outlive it, and all ranks of a host share it.
uint64_t next_incarnation() {
  static std::atomic<uint64_t> last{0};
  const auto now = static_cast<uint64_t>(now_ns() / 1000);
  uint64_t previous = last.load();
  while (!last.compare_exchange_weak(previous, std::max(now, previous + 1))) {
  }
  return std::max(now, previous + 1);
}

uint8_t* map_file(int fd, uint64_t bytes, int protection, const std::string& path) {
  void* base = mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) fail("cannot map", path);
  madvise(base, bytes, MADV_DONTFORK);  // a forked child is no rank; fails harmlessly
#ifdef MADV_HUGEPAGE
  madvise(base, bytes, MADV_HUGEPAGE);  // only where the mount allows it
#endif
  return static_cast<uint8_t*>(base);
}

struct stat check_file(int fd, const std::string& path) {
  struct stat info;
  if (fstat(fd, &info) != 0) fail("cannot stat", path);
  if (!S_ISREG(info.st_mode)) throw SegmentFault(path + " is not a plain file");
  if (info.st_uid != geteuid()) throw SegmentFault(path + " belongs to another user");
  if ((info.st_mode & 0777) != 0600) throw SegmentFault(path + " must have mode 0600");
  return info;
}

int open_existing(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) fail("cannot open", path);
  return fd;
}

SegmentHeader read_header(int fd, const std::string& path) {
  Blob blob{};
  if (pread(fd, blob.data(), sizeof(SegmentHeader), 0) != sizeof(SegmentHeader)) {
    throw SegmentFault(path + " is too short for a segment");
  }
  return from_blob(blob.data(), blob.size());
}

SegmentHeader make_header(const std::string& run_id, const std::string& name, uint32_t rank,
                          const Layout& layout) {
  SegmentHeader header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.header_bytes = sizeof header;
  header.total_bytes = layout.total_bytes;
  header.rank = rank;
  header.pid = getpid();
  header.pid_start = process_start(header.pid);
  header.incarnation = next_incarnation();
  header.params = layout.params;
  std::memcpy(header.run_id, run_id.c_str(), run_id.size());
  std::memcpy(header.name, name.c_str(), name.size());
  return header;
}

}  // namespace

Segment::Segment(uint8_t* base, const Layout& layout, bool is_owner)
    : base_(base), layout_(layout), is_owner_(is_owner), pid_(getpid()) {}

Segment::~Segment() {
  if (pid_ != getpid()) return;  // a forked child inherits the object, not the mapping
  if (is_owner_) close();
  munmap(base_, layout_.total_bytes);
}

std::shared_ptr<Segment> Segment::create(const std::string& run_id, const std::string& name,
                                         uint32_t rank, const LayoutParams& params) {
  const Layout layout(params);
  const std::string path = kFolder + segment_name(run_id, name);
  if (rank >= params.max_ranks) {
    throw SegmentFault("rank=" + std::to_string(rank) + " must be below max_ranks=" +
                       std::to_string(params.max_ranks));
  }
  check_room(layout.total_bytes);
  const SegmentHeader header = make_header(run_id, name, rank, layout);
  const std::string fresh = path + "~" + std::to_string(header.incarnation);
  const File file(::open(fresh.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (file.fd() < 0) fail("cannot create", fresh);
  fault_point(FaultPoint::kCreated);
  std::shared_ptr<Segment> segment;
  try {
    if (fchmod(file.fd(), 0600) != 0) fail("cannot set the mode of", fresh);
    if (ftruncate(file.fd(), static_cast<off_t>(layout.total_bytes)) != 0) {
      fail("cannot size", fresh);
    }
    uint8_t* base = map_file(file.fd(), layout.total_bytes, PROT_READ | PROT_WRITE, fresh);
    segment.reset(new Segment(base, layout, true));
    std::memcpy(base, &header, sizeof header);
    store_release(segment->at<SegmentHeader>(0)->state,
                  static_cast<uint32_t>(SegmentState::kReady));
    const struct stat info = check_file(file.fd(), fresh);
    segment->device_ = info.st_dev;
    segment->inode_ = info.st_ino;
    remember_own(path, segment);  // before anybody can find it
    if (rename(fresh.c_str(), path.c_str()) != 0) fail("cannot name", path);
  } catch (...) {
    ::unlink(fresh.c_str());
    throw;
  }
  return segment;
}

std::shared_ptr<Segment> Segment::open(const Blob& blob) {
  const SegmentHeader told = from_blob(blob.data(), blob.size());
  if (auto own = find_own(told)) return own;
  const std::string path = path_of(told);
  const File file(open_existing(path));
  const struct stat info = check_file(file.fd(), path);
  if (static_cast<uint64_t>(info.st_size) != told.total_bytes) {
    throw SegmentFault(path + " has " + std::to_string(info.st_size) + " bytes, its blob says " +
                       std::to_string(told.total_bytes));
  }
  SegmentHeader found = read_header(file.fd(), path);
  if (found.incarnation != told.incarnation) {
    throw SegmentFault(path + " is another incarnation than the blob's: ask for a new blob");
  }
  found.state = told.state;
  if (std::memcmp(&found, &told, sizeof told) != 0) {
    throw SegmentFault(path + " contradicts its blob");
  }
  const Layout layout(told.params);
  uint8_t* base = map_file(file.fd(), layout.total_bytes, PROT_READ, path);
  std::shared_ptr<Segment> segment(new Segment(base, layout, false));
  const uint64_t shared_bytes = layout.p2p_meta - layout.doorbell;
  if (mprotect(base + layout.doorbell, shared_bytes, PROT_READ | PROT_WRITE) != 0) {
    fail("cannot open the window of", path);
  }
  return segment;
}

Blob Segment::read_blob(const std::string& run_id, const std::string& name) {
  const std::string path = kFolder + segment_name(run_id, name);
  const File file(open_existing(path));
  check_file(file.fd(), path);
  return to_blob(read_header(file.fd(), path));
}

bool Segment::unlink() {
  const std::string path = path_of(header());
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) return false;
  const bool is_ours = is_owner_ && info.st_dev == device_ && info.st_ino == inode_;
  return is_ours && ::unlink(path.c_str()) == 0;
}

void Segment::close() {
  if (!is_owner_) return;
  store_release(at<SegmentHeader>(0)->state, static_cast<uint32_t>(SegmentState::kClosed));
}

}  // namespace xds::xccl
