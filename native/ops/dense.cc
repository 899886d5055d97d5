// Linear layers, norms and feed-forward networks: the split of the work over threads.
#include <algorithm>

#include "for_rows.h"
#include "gemm.h"
#include "ops.h"

namespace xds {
namespace {

constexpr int64_t kReadAhead = 256 << 10;  // bytes for each thread, within the second cache
constexpr int64_t kBlockBytes = 1 << 20;   // of rows that stay in that cache
constexpr int64_t kBlockRows = 128;        // of a block at least: it is worth reading the weight
constexpr int64_t kGatedRows = 64;         // of a task whose products stay in the first cache
constexpr int64_t kGatedBytes = 1 << 18;   // of gate and up products that are worth it

// Rows as panel_gemm reads them.
struct Activations {
  const uint8_t* data;
  ptrdiff_t stride;  // bytes
  const float* row_scale;
};

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

// Bytes of a row of n int8 activations, and from the coarse to the fine ones of w8a16.
int64_t int8_row_bytes(int64_t n) { return round_up(n, 64); }

// Bytes of a prepared row of n activations.
int64_t row_bytes(const Kernels& kernels, DType dtype, int64_t n) {
  if (dtype == DType::kInt4) return round_up(n, kInt4Group) / kInt4Group * kInt4RowBytes;
  if (dtype == DType::kW8A8G64) return round_up(n, kInt8Group) / kInt8Group * kInt8GroupBytes;
  if (is_int8(dtype)) return int8_row_bytes(n) * (dtype == DType::kW8A16 ? 2 : 1);
  return round_up(n, step_width(dtype)) * kernels.bf16_item;
}

// Zeros up to the end of a k-step, and the offset that some instructions want.
void finish_int8_row(const Kernels& kernels, int64_t n, uint8_t* row) {
  const int64_t stop = round_up(n, 4);
  std::fill(row + n, row + stop, uint8_t{0});
  if (!kernels.s8_offset) return;
  for (int64_t i = 0; i < stop; ++i) row[i] ^= 0x80;  // + 128
}

void prepare_row(const Kernels& kernels, DType dtype, const float* x, int64_t n, uint8_t* out,
                 float* scale) {
  if (dtype == DType::kBf16) return kernels.prepare_bf16(x, n, out);
  if (dtype == DType::kInt4) return kernels.prepare_int4(x, n, out);
  if (dtype == DType::kW8A8G64) return kernels.prepare_w8a8(x, n, out);
  const int64_t length = int8_row_bytes(n);
  auto* bytes = reinterpret_cast<int8_t*>(out);
  *scale = dtype == DType::kInt8 ? kernels.quantize_row(x, n, bytes)
                                 : kernels.split_row(x, n, bytes, bytes + length);
  finish_int8_row(kernels, n, out);
  if (dtype == DType::kW8A16) finish_int8_row(kernels, n, out + length);
}

// The rows of x [rows, n] (row stride `stride`) in the form the GEMM of `dtype` reads. With
// swiglu, a row is silu(x[:n]) * x[n:2n], computed in place first. A product takes every
// `groups`th row.
Activations prepare(Context& ctx, float* x, int64_t rows, int64_t n, int64_t stride, DType dtype,
                    bool swiglu, int64_t groups = 1) {
  const Kernels& kernels = ctx.kernels;
  Activations out{reinterpret_cast<const uint8_t*>(x), stride * 4, nullptr};
  if (dtype == DType::kFloat32 && !swiglu) return out;
  uint8_t* data = nullptr;
  float* scales = nullptr;
  if (dtype != DType::kFloat32) {
    out.stride = round_up(row_bytes(kernels, dtype, n), 64);
    out.data = data = ctx.activations.get<uint8_t>((rows + kRowSlack * groups) * out.stride);
    out.row_scale = scales = ctx.row_scales.get<float>(rows);
  }
  for_rows(ctx, rows, n, [&](int64_t row, int) {
    float* values = x + row * stride;
    if (swiglu) kernels.silu_mul_row(values, values + n, n, values);
    if (data) prepare_row(kernels, dtype, values, n, data + row * out.stride, scales + row);
  });
  return out;
}

// x is read only: without swiglu, prepare() does not write to it.
Activations prepare(Context& ctx, const float* x, int64_t rows, int64_t n, DType dtype,
                    int64_t groups = 1) {
  return prepare(ctx, const_cast<float*>(x), rows, n, n, dtype, false, groups);
}

PanelTask panel_task(const Product& p, const Weight& w, int64_t panel, int64_t first_row,
                     int64_t rows, const float* bias) {
  PanelTask task{};
  task.a = p.a + first_row * p.a_stride;
  task.a_stride = p.a_stride;
  task.rows = rows;
  task.b = w.panel(p.group, panel);
  task.steps = w.steps();
  if (p.c != nullptr) task.c = p.c + first_row * p.c_stride + panel * kPanel;
  task.c_stride = p.c_stride;
  task.cols = std::min(kPanel, w.n - panel * kPanel);
  task.bias = bias == nullptr ? nullptr : bias + panel * kPanel;
  if (is_int8(w.dtype)) {
    task.a_fine = int8_row_bytes(w.k);
    task.row_scale = p.row_scale + first_row * p.row_scale_stride;
    task.row_scale_stride = p.row_scale_stride;
    task.col_scale = w.scales(p.group) + panel * kPanel;
    task.col_sum = w.column_sums(p.group) + panel * kPanel;
  }
  return task;
}

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
    const int64_t wanted = std::max(kBlockRows, (p.rows + threads_ - 1) / threads_);
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

// Spreads the products over the threads.
void multiply(Context& ctx, const std::vector<Product>& products, const Weight& w,
              const float* bias = nullptr, const PanelSink* sink = nullptr) {
  const auto panel_gemm = ctx.kernels.panel_gemm[static_cast<int>(w.dtype)];
  const Items items(products, w.panels(), kRowChunk, ctx.pool.size());
  share_out(ctx, items, w, [&](const Items::Place& at, const uint8_t* next, int thread) {
    PanelTask task = panel_task(at.product, w, at.panel, at.first_row, at.rows, bias);
    task.next = next;
    if (sink != nullptr) return (*sink)(task, at.panel, at.first_row, thread);
    panel_gemm(task);
  });
}

// Products with gate and up, of which only silu(gate) * up leaves the cache: c is [rows, w.n / 2].
void multiply_gated(Context& ctx, const std::vector<Product>& products, const Weight& w) {
  const auto panel_gemm = ctx.kernels.panel_gemm[static_cast<int>(w.dtype)];
  const int64_t panels = w.panels() / 2;
  for (Scratch& scratch : ctx.thread_scratch) scratch.get<float>(kGatedRows * 2 * kPanel);
  const Items items(products, panels, kGatedRows, ctx.pool.size());
  share_out(ctx, items, w, [&](const Items::Place& at, const uint8_t* next, int thread) {
    const Product& p = at.product;
    Scratch& scratch = ctx.thread_scratch[static_cast<size_t>(thread)];
    float* block = scratch.get<float>(kGatedRows * 2 * kPanel);
    for (int which = 0; which < 2; ++which) {
      const int64_t panel = at.panel + which * panels;
      PanelTask task = panel_task(p, w, panel, at.first_row, at.rows, nullptr);
      task.c = block + which * kPanel;
      task.c_stride = 2 * kPanel;
      task.next = which == 0 ? w.panel(p.group, at.panel + panels) : next;
      panel_gemm(task);
    }
    float* out = p.c + at.first_row * p.c_stride + at.panel * kPanel;
    for (int64_t row = 0; row < at.rows; ++row, block += 2 * kPanel, out += p.c_stride) {
      ctx.kernels.silu_mul_row(block, block + kPanel, kPanel, out);
    }
  });
}

// One product per expert that has rows; rows of `a` and `c` are sorted by expert.
std::vector<Product> by_expert(const Activations& a, const int32_t* counts, const Weight& w,
                               float* c, int64_t c_stride) {
  std::vector<Product> products;
  int64_t first = 0;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t rows = counts[group];
    if (rows > 0) {
      products.push_back({a.data + first * a.stride, a.stride, rows,
                          a.row_scale == nullptr ? nullptr : a.row_scale + first, 1, group,
                          c + first * c_stride, c_stride});
    }
    first += rows;
  }
  return products;
}

}  // namespace

void pack_weight(Context& ctx, const float* values, const Weight& shape, uint8_t* out) {
  ctx.pool.for_each(shape.groups * shape.panels(), [&](int64_t item, int) {
    pack_panel(values, shape, item / shape.panels(), item % shape.panels(), out);
  });
}

void embed(Context& ctx, Elements table, int64_t width, const int32_t* ids, int64_t tokens,
           float* out) {
  const Timed timed(ctx.times, Op::kEmbed);
  for_rows(ctx, tokens, width, [&](int64_t t, int) {
    const int64_t at = ids[t] * width;
    if (table.bf16) {
      ctx.kernels.from_bf16_row(static_cast<const uint16_t*>(table.data) + at, width,
                                out + t * width);
    } else {
      std::copy_n(static_cast<const float*>(table.data) + at, width, out + t * width);
    }
  });
}

void linear(Context& ctx, const float* x, int64_t rows, const Weight& w, const float* bias,
            float* out) {
  const Timed timed(ctx.times, Op::kLinear);
  const Activations a = prepare(ctx, x, rows, w.k, w.dtype);
  multiply(ctx, {{a.data, a.stride, rows, a.row_scale, 1, 0, out, w.n}}, w, bias);
}

void linear_panels(Context& ctx, const float* x, int64_t rows, const Weight& w,
                   const PanelSink& sink) {
  const Activations a = prepare(ctx, x, rows, w.k, w.dtype);
  multiply(ctx, {{a.data, a.stride, rows, a.row_scale, 1, 0, nullptr, 0}}, w, nullptr, &sink);
}

void grouped_linear(Context& ctx, const float* x, int64_t tokens, const Weight& w, float* out) {
  const Timed timed(ctx.times, Op::kGroupedLinear);
  const Activations a = prepare(ctx, x, tokens * w.groups, w.k, w.dtype, w.groups);
  std::vector<Product> products;
  for (int64_t g = 0; g < w.groups; ++g) {
    products.push_back({a.data + g * a.stride, a.stride * w.groups, tokens,
                        a.row_scale == nullptr ? nullptr : a.row_scale + g, w.groups, g,
                        out + g * w.n, w.groups * w.n});
  }
  multiply(ctx, products, w);
}

void rms_norm(Context& ctx, const float* x, const float* weight, int64_t rows, int64_t n, float eps,
              float* out) {
  const Timed timed(ctx.times, Op::kNorm);
  for_rows(ctx, rows, n, [&](int64_t row, int) {
    ctx.kernels.rms_norm_row(x + row * n, weight, n, eps, out + row * n);
  });
}

void add_rms_norm(Context& ctx, const float* residual, const float* x, const float* weight,
                  int64_t rows, int64_t n, float eps, float* sum, float* out) {
  const Timed timed(ctx.times, Op::kAddNorm);
  for_rows(ctx, rows, n, [&](int64_t row, int) {
    const int64_t at = row * n;
    ctx.kernels.add_row(residual + at, x + at, n, sum + at);
    ctx.kernels.rms_norm_row(sum + at, weight, n, eps, out + at);
  });
}

void add_rows(Context& ctx, const float* a, const float* b, int64_t rows, int64_t n, float* out) {
  const Timed timed(ctx.times, Op::kAdd);
  for_rows(ctx, rows, n, [&](int64_t row, int) {
    ctx.kernels.add_row(a + row * n, b + row * n, n, out + row * n);
  });
}

void quantize_rows(Context& ctx, const float* x, int64_t rows, int64_t n, int8_t* out,
                   float* scales) {
  const Timed timed(ctx.times, Op::kQuantize);
  for_rows(ctx, rows, n, [&](int64_t row, int) {
    scales[row] = ctx.kernels.quantize_row(x + row * n, n, out + row * n);
  });
}

void expert_mlp(Context& ctx, const float* x, const int32_t* counts, const Weight& gate_up,
                const Weight& down, float* out) {
  const Timed timed(ctx.times, Op::kExpertMlp);
  int64_t rows = 0;
  for (int64_t e = 0; e < gate_up.groups; ++e) rows += counts[e];
  float* hidden = ctx.hidden.get<float>(rows * gate_up.n);
  const Activations in = prepare(ctx, x, rows, gate_up.k, gate_up.dtype);
  const bool is_gated = down.k % kPanel == 0 && rows * gate_up.n * 4 >= kGatedBytes;
  const int64_t stride = is_gated ? down.k : gate_up.n;
  const std::vector<Product> products = by_expert(in, counts, gate_up, hidden, stride);
  if (is_gated) {
    multiply_gated(ctx, products, gate_up);
  } else {
    multiply(ctx, products, gate_up);
  }
  const Activations mid = prepare(ctx, hidden, rows, down.k, stride, down.dtype, !is_gated);
  multiply(ctx, by_expert(mid, counts, down, out, down.n), down);
}

}  // namespace xds
