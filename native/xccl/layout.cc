#include "layout.h"

#include <algorithm>
#include <cstring>

#include "messages.h"
#include "status.h"

namespace xds::xccl {
namespace {

void check_range(const char* what, uint64_t value, uint64_t low, uint64_t high) {
  if (value >= low && value <= high) return;
  throw SegmentFault(std::string(what) + "=" + std::to_string(value) + " must lie in [" +
                     std::to_string(low) + ", " + std::to_string(high) + "]");
}

void check_power_of_two(const char* what, uint64_t value) {
  if ((value & (value - 1)) == 0) return;
  throw SegmentFault(std::string(what) + "=" + std::to_string(value) + " must be a power of two");
}

void check_lines(const char* what, uint64_t value) {
  if (value % kLine == 0) return;
  throw SegmentFault(std::string(what) + "=" + std::to_string(value) +
                     " must be a multiple of 64");
}

bool is_name(const std::string& text, bool dashes) {
  const auto good = [dashes](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           c == '_' || c == '.' || (dashes && c == '-');
  };
  return !text.empty() && text.size() < kNameBytes && std::all_of(text.begin(), text.end(), good);
}

uint64_t next_page(uint64_t offset) {
  return checked_add(offset, kPage - 1) / kPage * kPage;
}

}  // namespace

uint64_t checked_mul(uint64_t a, uint64_t b) {
  uint64_t result;
  if (__builtin_mul_overflow(a, b, &result)) throw SegmentFault("the layout's size overflows");
  return result;
}

uint64_t checked_add(uint64_t a, uint64_t b) {
  uint64_t result;
  if (__builtin_add_overflow(a, b, &result)) throw SegmentFault("the layout's size overflows");
  return result;
}

Layout::Layout(const LayoutParams& p) : params(p) {
  check_range("max_ranks", p.max_ranks, 1, kMaxRanks);
  check_range("p2p_slots", p.p2p_slots, 2, 1024);
  check_range("p2p_slot_bytes", p.p2p_slot_bytes, 64, 64 << 20);
  check_range("row_slots", p.row_slots, 1, 64);
  check_range("request_bytes", p.request_bytes, 64, uint64_t{1} << 32);
  check_range("reply_bytes", p.reply_bytes, 64, uint64_t{1} << 32);
  check_range("window_bytes", p.window_bytes, 0, uint64_t{1} << 36);
  check_power_of_two("p2p_slots", p.p2p_slots);
  check_power_of_two("row_slots", p.row_slots);
  check_lines("p2p_slot_bytes", p.p2p_slot_bytes);
  check_lines("request_bytes", p.request_bytes);
  check_lines("reply_bytes", p.reply_bytes);
  check_lines("window_bytes", p.window_bytes);

  const uint64_t chunks = checked_mul(p.max_ranks, p.p2p_slots);
  const uint64_t rows = checked_mul(p.max_ranks, p.row_slots);
  uint64_t end = kPage;
  const auto area = [&end](uint64_t count, uint64_t bytes) {
    const uint64_t start = next_page(end);
    end = checked_add(start, checked_mul(count, bytes));
    return start;
  };
  links = kPage + sizeof(LiveLine) + sizeof(SleepLine);
  end = checked_add(links, checked_mul(p.max_ranks, sizeof(LinkLine)));
  doorbell = area(1, kPage);
  window = area(1, p.window_bytes);
  p2p_meta = area(chunks, sizeof(ChunkMeta));
  request_head = area(rows, sizeof(RequestHeader));
  reply_head = area(rows, sizeof(ReplyHeader));
  p2p_data = area(chunks, p.p2p_slot_bytes);
  request_data = area(rows, p.request_bytes);
  reply_data = area(rows, p.reply_bytes);
  total_bytes = next_page(end);
  check_range("the segment's size", total_bytes, kPage, kMaxSegmentBytes);
}

Blob to_blob(const SegmentHeader& header) {
  Blob blob{};
  std::memcpy(blob.data(), &header, sizeof header);
  return blob;
}

SegmentHeader from_blob(const uint8_t* data, uint64_t size) {
  if (size != kBlobBytes) {
    throw SegmentFault("a blob has " + std::to_string(kBlobBytes) + " bytes, not " +
                       std::to_string(size));
  }
  SegmentHeader header;
  std::memcpy(&header, data, sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) {
    throw SegmentFault("not an XCCL segment: wrong magic");
  }
  check_range("version", header.version, kVersion, kVersion);
  check_range("header_bytes", header.header_bytes, sizeof header, sizeof header);
  const Layout layout(header.params);
  check_range("total_bytes", header.total_bytes, layout.total_bytes, layout.total_bytes);
  check_range("rank", header.rank, 0, header.params.max_ranks - 1);
  check_range("pid", static_cast<uint64_t>(header.pid), 1, INT32_MAX);
  check_range("incarnation", header.incarnation, 1, UINT64_MAX);
  for (const char* text : {header.run_id, header.name}) {
    if (std::memchr(text, 0, kNameBytes) == nullptr) throw SegmentFault("a name has no end");
  }
  segment_name(header.run_id, header.name);
  return header;
}

std::string segment_name(const std::string& run_id, const std::string& name) {
  if (!is_name(run_id, false)) {
    throw SegmentFault("run_id '" + run_id + "' must be 1 to 47 letters, digits, '_' or '.'");
  }
  if (!is_name(name, true)) {
    throw SegmentFault("name '" + name + "' must be 1 to 47 letters, digits, '_', '.' or '-'");
  }
  return "/xds-" + run_id + "-" + name;
}

}  // namespace xds::xccl
