// Measures what the machine can do at best, to hold the operators against it.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

#include "ops.h"

namespace xds {
namespace {

template <class Body>
double best_seconds(int repeats, Body&& body) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  for (int i = 0; i <= repeats; ++i) {  // the first run warms up
    const auto start = Clock::now();
    body();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (i > 0) best = std::min(best, seconds);
  }
  return best;
}

}  // namespace

double read_bandwidth(Context& ctx, int64_t bytes, int repeats) {
  constexpr int64_t kChunk = 1 << 18;  // floats
  const int64_t chunks = std::max<int64_t>(1, bytes / 4 / kChunk);
  Scratch memory;
  float* data = memory.get<float>(chunks * kChunk);
  std::fill_n(data, chunks * kChunk, 1.0f);
  std::vector<float> sums(static_cast<size_t>(chunks));
  const double seconds = best_seconds(repeats, [&] {
    ctx.pool.for_each(chunks, [&](int64_t i, int) {
      sums[static_cast<size_t>(i)] = ctx.kernels.read_floats(data + i * kChunk, kChunk);
    });
  });
  return static_cast<double>(chunks * kChunk * 4) / seconds;
}

namespace {

constexpr int64_t kPeakRows = 96;  // whole tiles of AVX-512 and AMX, a remainder of AVX2's
static_assert(kPeakRows <= kRowChunk);
constexpr int64_t kPeakStride = 2048 + 128;  // no power of two: rows would share a few cache lines

// One thread's operands of a product whose weights stay in its cache; all zero but the scales.
struct PeakOperands {
  Scratch a, b, c, scales;
  PanelTask task{};

  PeakOperands(DType dtype, int64_t steps) {
    const int64_t panel_bytes = steps * step_bytes(dtype);
    const auto a_bytes = static_cast<size_t>((kPeakRows + kRowSlack) * kPeakStride);
    task.a = static_cast<uint8_t*>(std::memset(a.get<uint8_t>(a_bytes), 0, a_bytes));
    task.b = static_cast<uint8_t*>(
        std::memset(b.get<uint8_t>(panel_bytes), 0, static_cast<size_t>(panel_bytes)));
    float* ones = scales.get<float>(kPeakRows + 2 * kPanel);
    std::fill_n(ones, kPeakRows + 2 * kPanel, 1.0f);
    task.a_stride = kPeakStride;
    task.a_fine = kPeakStride / 2;
    task.rows = kPeakRows;
    task.steps = steps;
    task.c = c.get<float>(kPeakRows * kPanel);
    task.c_stride = task.cols = kPanel;
    task.row_scale = ones;
    task.row_scale_stride = 1;
    task.col_scale = ones + kPeakRows;
    task.col_sum = reinterpret_cast<const int32_t*>(ones + kPeakRows + kPanel);
  }
};

}  // namespace

double gemm_peak(Context& ctx, DType dtype, int repeats) {
  constexpr int64_t kCalls = 400;
  const int64_t steps = dtype == DType::kInt4 ? 32 : 256;
  std::vector<std::unique_ptr<PeakOperands>> operands(static_cast<size_t>(ctx.pool.size()));
  ctx.pool.run([&](int thread) {
    operands[static_cast<size_t>(thread)] = std::make_unique<PeakOperands>(dtype, steps);
  });
  const double seconds = best_seconds(repeats, [&] {
    ctx.pool.run([&](int thread) {
      const PanelTask& task = operands[static_cast<size_t>(thread)]->task;
      for (int64_t i = 0; i < kCalls; ++i) {
        ctx.kernels.panel_gemm[static_cast<int>(dtype)](task);
      }
    });
  });
  const double work = 2.0 * kPeakRows * steps * step_width(dtype) * kPanel * kCalls;
  return work * ctx.pool.size() / seconds;
}

}  // namespace xds
