// The LM head. Rows that want no more than their best id never have their logits in memory: each
// thread keeps the best of the panels it has computed.
//
//   panel (32 ids) x rows --> block in the cache --+--> argmax of the greedy rows, per thread
//                                                  +--> logits of the other rows
#include <algorithm>

#include "gemm.h"
#include "ops.h"

namespace xds {
namespace {

constexpr int64_t kBlock = kRowChunk * kPanel;  // floats: the products of one work item

struct ThreadState {
  float* block;  // [kRowChunk, kPanel]
  Best* best;    // [num_greedy]
};

ThreadState state_of(Context& ctx, int thread, int64_t num_greedy) {
  static_assert(sizeof(Best) == 2 * sizeof(float));
  Scratch& scratch = ctx.thread_scratch[static_cast<size_t>(thread)];
  float* block = scratch.get<float>(kBlock + 2 * num_greedy);
  return {block, reinterpret_cast<Best*>(block + kBlock)};
}

// Who holds the best is the same whichever thread had which panels.
int32_t merge(const Best* const* best, int threads, int64_t row) {
  Best merged = kNoBest;
  for (int t = 0; t < threads; ++t) {
    const Best& other = best[t][row];
    const bool is_tie = other.value == merged.value && other.id < merged.id;
    if (other.value > merged.value || is_tie) merged = other;
  }
  return merged.id == kNoBest.id ? 0 : merged.id;
}

}  // namespace

void lm_head(Context& ctx, const float* x, int64_t rows, const Weight& w, int64_t num_greedy,
             int32_t* ids, float* logits) {
  const Timed timed(ctx.times, Op::kLmHead);
  std::vector<Best*> best;
  for (int thread = 0; thread < ctx.pool.size(); ++thread) {
    best.push_back(state_of(ctx, thread, num_greedy).best);
    std::fill_n(best.back(), num_greedy, kNoBest);
  }
  const auto panel_gemm = ctx.kernels.panel_gemm[static_cast<int>(w.dtype)];
  linear_panels(ctx, x, rows, w, [&](PanelTask& task, int64_t panel, int64_t first, int thread) {
    const int64_t greedy = std::clamp<int64_t>(num_greedy - first, 0, task.rows);
    if (greedy == 0) {
      task.c = logits + (first - num_greedy) * w.n + panel * kPanel;
      task.c_stride = w.n;
      return panel_gemm(task);
    }
    const ThreadState state = state_of(ctx, thread, num_greedy);
    task.c = state.block;
    task.c_stride = kPanel;
    panel_gemm(task);
    ctx.kernels.argmax_rows(state.block, kPanel, greedy, task.cols, panel * kPanel,
                            state.best + first);
    for (int64_t row = greedy; row < task.rows; ++row) {
      std::copy_n(state.block + row * kPanel, task.cols,
                  logits + (first + row - num_greedy) * w.n + panel * kPanel);
    }
  });
  for (int64_t row = 0; row < num_greedy; ++row) ids[row] = merge(best.data(), ctx.pool.size(), row);
}

}  // namespace xds
