// How the products with one weight are shared out to the threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "context.h"
#include "for_rows.h"
#include "layout.h"

namespace xds {

inline constexpr int64_t kReadAhead = 256 << 10;  // bytes for each thread, within the second cache
inline constexpr int64_t kBlockBytes = 1 << 20;   // of rows that stay in that cache
inline constexpr int64_t kMinBlockRows = 128;      // of a block: the weight is worth reading

// The rows of x that meet one group of a weight, and where the results go.
struct Product {
  const uint8_t* a;
  ptrdiff_t a_stride;
  int64_t rows;
  const float* row_scale;
  int64_t row_scale_stride;
  int64_t group;
  float* c;  // null when a sink takes the products
  int64_t c_stride;
};

// The work items of some products with one weight: (product, block of rows, panel, rows of the
// block). A block of rows stays in the cache while one panel after the other is read. There is one
// per thread, if there are rows enough: a thread then has the same rows in every operator.
class Items {
 public:
  struct Place {
    const Product& product;
    int64_t panel;
    int64_t first_row;
    int64_t rows;
  };

  // Each item is at most `chunk` rows of one of `panels` panels, for `threads` threads.
  Items(const std::vector<Product>& products, int64_t panels, int64_t chunk, int threads)
      : products_(products), panels_(panels), chunk_(chunk), threads_(threads) {
    for (const Product& p : products) first_.push_back(first_.back() + chunks(p) * panels);
  }

  int64_t count() const { return first_.back(); }

  Place place(int64_t item) const {
    const auto after = std::upper_bound(first_.begin(), first_.end(), item);
    const size_t index = static_cast<size_t>(after - first_.begin()) - 1;
    const Product& p = products_[index];
    const int64_t most = chunks_of_block(p);
    const int64_t local = item - first_[index];
    const int64_t block = local / (most * panels_);
    const int64_t in_block = local - block * most * panels_;
    const int64_t chunks_here = std::min(most, chunks(p) - block * most);
    const int64_t first_row = (block * most + in_block % chunks_here) * chunk_;
    return {p, in_block / chunks_here, first_row, std::min(chunk_, p.rows - first_row)};
  }

 private:
  int64_t chunks(const Product& p) const { return (p.rows + chunk_ - 1) / chunk_; }

  int64_t chunks_of_block(const Product& p) const {
    const int64_t wanted = std::max(kMinBlockRows, (p.rows + threads_ - 1) / threads_);
    const int64_t rows = std::min(wanted, kBlockBytes / p.a_stride);
    return std::max<int64_t>(1, (rows + chunk_ - 1) / chunk_);
  }

  const std::vector<Product>& products_;
  const int64_t panels_;
  const int64_t chunk_;
  const int threads_;
  std::vector<int64_t> first_{0};  // item of each product
};

// What each thread reads once its share of `w` is done: its first panels of the weight that is
// likely to follow, or nothing.
class Upcoming {
 public:
  Upcoming(Context& ctx, const Weight& w) : pool_(ctx.pool), next_(ctx.succession.follow(w)) {
    if (next_ != nullptr && next_->groups > 1) next_ = nullptr;  // of experts, who knows which
  }

  const uint8_t* begin(int thread) const {
    return bytes(thread) > 0 ? next_->panel(0, share(thread).first) : nullptr;
  }

  // The thread goes on with it whenever it waits; the first bytes are `fetched` by then.
  void read_ahead(int thread, int64_t fetched) const {
    const int64_t left = std::min(bytes(thread), kReadAhead) - fetched;
    if (left > 0) pool_.read_ahead(thread, begin(thread) + fetched, left);
  }

 private:
  ThreadPool::Share share(int thread) const { return pool_.share(next_->panels(), thread); }

  int64_t bytes(int thread) const {
    if (next_ == nullptr) return 0;
    return (share(thread).stop - share(thread).first) * next_->panel_bytes();
  }

  ThreadPool& pool_;
  const Weight* next_;
};

// compute(place, next, thread) for all items, shared out to the threads; `next` is the panel that
// the thread reads after those of this item, or null.
template <class Compute>
void share_out(Context& ctx, const Items& items, const Weight& w, Compute&& compute) {
  const Upcoming upcoming(ctx, w);
  auto panel = [&](const Items::Place& at) { return w.panel(at.product.group, at.panel); };
  auto body = [&](int64_t item, int thread) {
    const Items::Place at = items.place(item);
    const ThreadPool::Share own = ctx.pool.share(items.count(), thread);
    if (item == own.first) upcoming.read_ahead(thread, w.panel_bytes());
    const uint8_t* next = nullptr;
    if (item >= own.first && item < own.stop) {  // else it is an item of a late thread
      next = item + 1 < own.stop ? panel(items.place(item + 1)) : upcoming.begin(thread);
    }
    compute(at, next == panel(at) ? nullptr : next, thread);
  };
  if (items.count() * w.k * kPanel < kSmallWork) {
    for (int64_t item = 0; item < items.count(); ++item) body(item, 0);
  } else {
    ctx.pool.for_each_in_shares(items.count(), body);
  }
}

}  // namespace xds
