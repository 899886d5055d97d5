// Choices along a row of logits. Most groups of 16 hold nothing of interest, which one comparison
// tells; only the others are looked at lane by lane.

// (value, id) before `best`: larger, or equal and with a lower id.
inline bool is_before(float value, int64_t id, const Best& best) {
  return value > best.value || (value == best.value && id < best.id);
}

// body(first, mask) for each group of 16 of the row that has values >= bound(), which may rise.
template <class Bound, class Body>
inline void for_groups_at_least(const float* x, int64_t n, Bound&& bound, Body&& body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const uint32_t mask = at_least(load(x + i), set1(bound()));
    if (mask != 0) body(i, mask);
  }
  uint32_t mask = 0;
  for (int64_t j = i; j < n; ++j) mask |= static_cast<uint32_t>(x[j] >= bound()) << (j - i);
  if (mask != 0) body(i, mask);
}

// body(i) for each bit of the mask, ascending.
template <class Body>
inline void for_lanes(int64_t first, uint32_t mask, Body&& body) {
  for (; mask != 0; mask &= mask - 1) body(first + __builtin_ctz(mask));
}

void argmax_rows(const float* x, ptrdiff_t stride, int64_t rows, int64_t n, int64_t first_id,
                 Best* best) {
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    Best held = best[row];
    for_groups_at_least(x, n, [&] { return held.value; }, [&](int64_t first, uint32_t mask) {
      for_lanes(first, mask, [&](int64_t i) {
        if (is_before(x[i], first_id + i, held)) held = {x[i], static_cast<int32_t>(first_id + i)};
      });
    });
    best[row] = held;
  }
}

int64_t collect_row(const float* x, int64_t n, float low, float high, int32_t* out) {
  int64_t count = 0;
  for_groups_at_least(x, n, [&] { return low; }, [&](int64_t first, uint32_t mask) {
    for_lanes(first, mask, [&](int64_t i) {
      out[count] = static_cast<int32_t>(i);
      count += x[i] < high;
    });
  });
  return count;
}

void best_row(const float* x, int64_t n, int64_t count, int32_t* out) {
  int64_t held = 0;
  auto insert = [&](int64_t i) {
    if (held == count && !(x[i] > x[out[held - 1]])) return;
    int64_t at = held < count ? held++ : held - 1;
    for (; at > 0 && x[i] > x[out[at - 1]]; --at) out[at] = out[at - 1];
    out[at] = static_cast<int32_t>(i);
  };
  for (int64_t i = 0; i < lesser(count, n); ++i) insert(i);
  const int64_t done = held;
  for_groups_at_least(x + done, n - done, [&] { return x[out[count - 1]]; },
                      [&](int64_t first, uint32_t mask) {
                        for_lanes(done + first, mask, insert);
                      });
}

// Eight running sums, so that the order of addition is fixed but not serial.
double exp_sum_row(const float* x, int64_t n, float shift, float divisor) {
  constexpr int64_t kBlock = 512;  // a multiple of 8
  float block[kBlock];
  double sums[8] = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = lesser(kBlock, n - begin);
    exp_row(x + begin, count, shift, divisor, block);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(block[i + j]);
    }
    for (; i < count; ++i) sums[0] += static_cast<double>(block[i]);
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}
