// Linear layers, norms and feed-forward networks: the split of the work over threads.
#include <algorithm>

#include "activations.h"
#include "for_rows.h"
#include "gemm.h"
#include "ops.h"
#include "share_out.h"

namespace xds {
namespace {

constexpr int64_t kGatedRows = 64;         // of a task whose products stay in the first cache
constexpr int64_t kGatedBytes = 1 << 18;   // of gate and up products that are worth it

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
