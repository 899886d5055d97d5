// Attention of a few query rows of one sequence over one head of the paged cache.
//
// The context is walked in partitions of kPartition positions counted from position 0. A row takes
// a softmax over each partition on its own (maximum, sum, weighted values) and the partitions are
// merged in ascending order, so neither chunking nor batch nor block size touches its bits.

struct AttendScratch {
  float* keys;     // [key_dim, kPartition]: keys transposed, so that scores are a small GEMM
  float* values;   // [kPartition, value_pad]
  float* scores;   // [rows, kPartition]
  float* part;     // [rows, value_pad]: weighted values of this partition
  float* total;    // [rows, value_pad]
  float* max;      // [rows]
  float* sum;      // [rows]
  float* staging;  // [16, key_pad]
  int64_t value_pad;
  int64_t key_pad;
};

inline AttendScratch split_scratch(const AttendTask& t) {
  AttendScratch s;
  s.value_pad = (t.value_dim + 15) / 16 * 16;
  s.key_pad = (t.key_dim + 15) / 16 * 16;
  s.keys = t.scratch;
  s.values = s.keys + t.key_dim * kPartition;
  s.scores = s.values + kPartition * s.value_pad;
  s.part = s.scores + t.rows * kPartition;
  s.total = s.part + t.rows * s.value_pad;
  s.max = s.total + t.rows * s.value_pad;
  s.sum = s.max + t.rows;
  s.staging = s.sum + t.rows;
  return s;
}

// Row of the cache at `position`, `dim` floats, read in place or converted into `out`.
inline const float* cache_row(const AttendTask& t, const void* base, int64_t block_stride,
                              int64_t position, int64_t dim, int64_t row_stride, float* out) {
  const int64_t block = t.block_table[position / t.block_size];
  const int64_t offset = block * block_stride + position % t.block_size * row_stride;
  if (!t.bf16) return static_cast<const float*>(base) + offset;
  from_bf16_row(static_cast<const uint16_t*>(base) + offset, dim, out);
  return out;
}

// keys[d][j] for positions first + j, eight positions at a time.
inline void load_keys(const AttendTask& t, const AttendScratch& s, int64_t first, int64_t count) {
  for (int64_t j = 0; j < count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      float* to = s.staging + i * s.key_pad;
      const int64_t position = first + lesser(j + i, count - 1);
      const float* row = cache_row(t, t.keys, t.key_block_stride, position, t.key_dim, t.key_dim, to);
      if (row != to) std::memcpy(to, row, static_cast<size_t>(t.key_dim) * 4);
    }
    int64_t d = 0;
    for (; d + 8 <= t.key_dim; d += 8) {
      transpose8(s.staging + d, s.key_pad, s.keys + d * kPartition + j, kPartition);
    }
    for (; d < t.key_dim; ++d) {
      for (int64_t i = 0; i < 8; ++i) s.keys[d * kPartition + j + i] = s.staging[i * s.key_pad + d];
    }
  }
}

inline void load_values(const AttendTask& t, const AttendScratch& s, int64_t first, int64_t count) {
  const bool latent = t.values == nullptr;
  const void* base = latent ? t.keys : t.values;
  const int64_t stride = latent ? t.key_block_stride : t.value_block_stride;
  const int64_t row_stride = latent ? t.key_dim : t.value_dim;
  for (int64_t j = 0; j < count; ++j) {
    float* to = s.values + j * s.value_pad;
    const float* row = cache_row(t, base, stride, first + j, t.value_dim, row_stride, to);
    if (row != to) std::memcpy(to, row, static_cast<size_t>(t.value_dim) * 4);
    for (int64_t d = t.value_dim; d < s.value_pad; ++d) to[d] = 0.0f;
  }
}

struct PartSoftmax {
  float max;
  float sum;
};

// scores -> exp(scores * scale - max) over the first `count` entries; zero after them.
inline PartSoftmax softmax_part(float* scores, int64_t count, float scale) {
  F16 largest = set1(-INFINITY);
  for (int64_t i = 0; i < kPartition; i += 16) {
    const F16 scaled = mul(load(scores + i), set1(scale));
    store(scores + i, scaled);
  }
  for (int64_t i = count; i < kPartition; ++i) scores[i] = -INFINITY;
  for (int64_t i = 0; i < kPartition; i += 16) largest = max(largest, load(scores + i));
  const float top = reduce_max(largest);
  F16 sum = set1(0.0f);
  for (int64_t i = 0; i < kPartition; i += 16) {
    const F16 weight = exp16(sub(load(scores + i), set1(top)));
    store(scores + i, weight);
    sum = add(sum, weight);
  }
  return {top, reduce_add(sum)};
}

inline float exp1(float x) {
  float lanes[16];
  store(lanes, exp16(set1(x)));
  return lanes[0];
}

inline void merge_part(const AttendScratch& s, int64_t row, PartSoftmax part, bool is_first) {
  float* total = s.total + row * s.value_pad;
  const float* values = s.part + row * s.value_pad;
  if (is_first) {
    std::memcpy(total, values, static_cast<size_t>(s.value_pad) * 4);
    s.max[row] = part.max;
    s.sum[row] = part.sum;
    return;
  }
  const float top = part.max > s.max[row] ? part.max : s.max[row];
  const float keep = exp1(s.max[row] - top), take = exp1(part.max - top);
  for (int64_t d = 0; d < s.value_pad; ++d) total[d] = total[d] * keep + values[d] * take;
  s.sum[row] = s.sum[row] * keep + part.sum * take;
  s.max[row] = top;
}

// One partition of `count` positions from `first`, for the rows that see any of it.
inline void attend_partition(const AttendTask& t, const AttendScratch& s, int64_t first,
                             int64_t count) {
  const int64_t start_token = greater(0, first - t.first_length + 1);
  const int64_t start = start_token * t.rows_per_token, rows = t.rows - start;
  auto seen = [&](int64_t row) {
    return lesser(count, t.first_length + row / t.rows_per_token - first);
  };
  float* scores = s.scores + start * kPartition;
  float* part = s.part + start * s.value_pad;
  small_gemm<false>(t.q + start * t.key_dim, t.key_dim, rows, s.keys, kPartition, t.key_dim,
                    scores, kPartition, kPartition / 16);
  const int64_t shared = seen(start);  // every row sees at least these
  PartSoftmax softmax[kMaxAttendRows];
  for (int64_t r = 0; r < rows; ++r) {
    softmax[r] = softmax_part(scores + r * kPartition, seen(start + r), t.scale);
  }
  small_gemm<false>(scores, kPartition, rows, s.values, s.value_pad, shared, part, s.value_pad,
                    s.value_pad / 16);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t more = seen(start + r) - shared;
    small_gemm<true>(scores + r * kPartition + shared, kPartition, more > 0 ? 1 : 0,
                     s.values + shared * s.value_pad, s.value_pad, more, part + r * s.value_pad,
                     s.value_pad, s.value_pad / 16);
    merge_part(s, start + r, softmax[r], first == 0);
  }
}

void attend(const AttendTask& t) {
  const AttendScratch s = split_scratch(t);
  const int64_t length = t.first_length + t.rows / t.rows_per_token - 1;
  for (int64_t first = 0; first < length; first += kPartition) {
    const int64_t count = lesser(kPartition, length - first);
    load_keys(t, s, first, count);
    load_values(t, s, first, count);
    attend_partition(t, s, first, count);
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t d = 0; d < t.value_dim; ++d) {
      t.out[r * t.value_dim + d] = s.total[r * s.value_pad + d] / s.sum[r];
    }
  }
}
