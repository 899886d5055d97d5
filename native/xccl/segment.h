// A named shared segment: create -> exchange the blob -> open and verify -> unlink.
//
//   owner                                  peer
//   create(): file made under a private
//     name, sized, header written, READY,
//     renamed to its public name
//   blob() ------- any channel ----------> open(): file of this user, mode 0600, size and header
//                                            as the blob says; mapped
//   unlink(): the name goes, mappings stay
//
// A new life of a rank makes a new file under the same name; those who mapped the old one keep it
// until they attach the new blob. Nothing is ever reused in place.
#pragma once

#include <memory>
#include <string>

#include "layout.h"
#include "messages.h"

namespace xds::xccl {

class Segment {
 public:
  // Throws SegmentFault: bad parameters, no room in /dev/shm, the system refuses.
  static std::shared_ptr<Segment> create(const std::string& run_id, const std::string& name,
                                         uint32_t rank, const LayoutParams& params);
  // Maps a peer's segment, read-only but for doorbell and window. A segment of this very process
  // shares the owner's mapping. Throws SegmentFault.
  static std::shared_ptr<Segment> open(const Blob& blob);

  // The blob of a segment by name, for ranks that find each other in /dev/shm.
  static Blob read_blob(const std::string& run_id, const std::string& name);

  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  // Removes the name if it still is this segment's; true when it did. Idempotent.
  bool unlink();
  void close();  // owner: tells peers that this life has ended

  const SegmentHeader& header() const { return *at<SegmentHeader>(0); }
  SegmentState state() const { return static_cast<SegmentState>(load_acquire(header().state)); }
  bool is_owner() const { return is_owner_; }
  uint8_t* base() const { return base_; }
  uint64_t size() const { return layout_.total_bytes; }
  const Layout& layout() const { return layout_; }

  template <class T>
  T* at(uint64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }
  LiveLine& live() const { return *at<LiveLine>(kPage); }
  SleepLine& sleep() const { return *at<SleepLine>(kPage + sizeof(LiveLine)); }
  LinkLine& link(uint32_t peer) const { return at<LinkLine>(layout_.links)[peer]; }
  Doorbell& doorbell() const { return *at<Doorbell>(layout_.doorbell); }
  uint8_t* window() const { return base_ + layout_.window; }

  ChunkMeta& chunk(uint32_t peer, uint64_t event) const {
    return at<ChunkMeta>(layout_.p2p_meta)[layout_.p2p_index(peer, event)];
  }
  uint8_t* chunk_data(uint32_t peer, uint64_t event) const {
    return base_ + layout_.p2p_data + layout_.p2p_index(peer, event) * layout_.params.p2p_slot_bytes;
  }
  RequestHeader& request(uint32_t peer, uint64_t seq) const {
    return at<RequestHeader>(layout_.request_head)[layout_.row_index(peer, seq)];
  }
  ReplyHeader& reply(uint32_t peer, uint64_t seq) const {
    return at<ReplyHeader>(layout_.reply_head)[layout_.row_index(peer, seq)];
  }
  uint64_t request_offset(uint32_t peer, uint64_t seq) const {
    return layout_.request_data + layout_.row_index(peer, seq) * layout_.params.request_bytes;
  }
  uint64_t reply_offset(uint32_t peer, uint64_t seq) const {
    return layout_.reply_data + layout_.row_index(peer, seq) * layout_.params.reply_bytes;
  }

 private:
  Segment(uint8_t* base, const Layout& layout, bool is_owner);

  uint8_t* base_;
  Layout layout_;
  bool is_owner_;
  int32_t pid_;
  uint64_t device_ = 0, inode_ = 0;  // of the file, so that unlink never takes a successor's name
};

}  // namespace xds::xccl
