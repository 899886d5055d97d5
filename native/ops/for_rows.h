// Work on the rows of an array, shared out to the threads where that pays.
#pragma once

#include <algorithm>
#include <cstdint>

#include "context.h"

namespace xds {

inline constexpr int64_t kSmallWork = 16384;  // elements below which waking threads costs more than it saves

// body(row, thread) for each of `rows` rows of `width` elements. Neighbours go to the same thread, in
// every operator the same ones, so that most of what a thread reads is in its own cache.
template <class Body>
void for_rows(Context& ctx, int64_t rows, int64_t width, Body&& body) {
  if (rows * width < kSmallWork) {
    for (int64_t row = 0; row < rows; ++row) body(row, 0);
    return;
  }
  const int64_t chunk = std::max<int64_t>(1, kSmallWork / 4 / std::max<int64_t>(1, width));
  ctx.pool.for_each_in_shares((rows + chunk - 1) / chunk, [&](int64_t item, int thread) {
    const int64_t end = std::min(rows, (item + 1) * chunk);
    for (int64_t row = item * chunk; row < end; ++row) body(row, thread);
  });
}

}  // namespace xds
