// Attention operators: cutting a batch into tasks, rotation, writes into the paged cache.
#include <algorithm>

#include "ops.h"

namespace xds {
namespace {

constexpr int64_t kTaskRows = 64;  // query rows wanted per task: enough to reuse a partition's keys

// Some tokens of one sequence and one kv head.
struct Item {
  int64_t sequence;
  int64_t first_token;
  int64_t tokens;
  int64_t head;       // kv head
  int64_t first_row;  // of the query heads
};

// The query side of an attention operator; fill(token, first query head, count, row) copies the
// query rows of one token into `row`.
struct Shape {
  int64_t num_heads;
  int64_t kv_heads;
  int64_t key_dim;
  int64_t value_dim;

  int64_t group() const { return num_heads / kv_heads; }
};

int64_t cache_offset(const Cache& kv, int64_t slot, int64_t head) {
  const int64_t block = slot / kv.block_size, row = slot % kv.block_size;
  return ((block * kv.heads + head) * kv.block_size + row) * kv.dim;
}

void write_row(const Kernels& kernels, void* cache, bool bf16, int64_t offset, const float* row,
               int64_t n) {
  if (bf16) {
    kernels.to_bf16_row(row, n, static_cast<uint16_t*>(cache) + offset);
  } else {
    std::copy_n(row, n, static_cast<float*>(cache) + offset);
  }
}

const void* at_offset(const void* base, bool bf16, int64_t elements) {
  return static_cast<const uint8_t*>(base) + elements * (bf16 ? 2 : 4);
}

// A group of query heads larger than this is cut: query rows do not depend on each other.
int64_t heads_per_item(int64_t group) { return std::min<int64_t>(group, kMaxAttendRows); }

std::vector<Item> cut(const Batch& batch, const Shape& shape) {
  std::vector<Item> items;
  const int64_t heads = heads_per_item(shape.group());
  const int64_t tile = std::max<int64_t>(1, kTaskRows / heads);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int64_t stop = batch.query_start[b + 1];
    for (int64_t t = batch.query_start[b]; t < stop; t += tile) {
      for (int64_t head = 0; head < shape.kv_heads; ++head) {
        for (int64_t row = 0; row < shape.group(); row += heads) {
          items.push_back({b, t, std::min(tile, stop - t), head, head * shape.group() + row});
        }
      }
    }
  }
  std::reverse(items.begin(), items.end());  // late tokens see most: start with them
  return items;
}

AttendTask make_task(const Batch& batch, const Cache& kv, const Shape& shape, const Item& item,
                     float scale) {
  AttendTask task{};
  const int64_t last_in_group = (item.head + 1) * shape.group();
  task.rows_per_token = std::min(heads_per_item(shape.group()), last_in_group - item.first_row);
  task.rows = item.tokens * task.rows_per_token;
  task.first_length = batch.seq_lens[item.sequence] -
                      (batch.query_start[item.sequence + 1] - item.first_token) + 1;
  task.key_dim = shape.key_dim;
  task.value_dim = shape.value_dim;
  task.scale = scale;
  const int64_t head_offset = item.head * kv.block_size * kv.dim;
  task.keys = at_offset(kv.keys, kv.bf16, head_offset);
  if (kv.values != nullptr) task.values = at_offset(kv.values, kv.bf16, head_offset);
  task.bf16 = kv.bf16;
  task.key_block_stride = task.value_block_stride = kv.heads * kv.block_size * kv.dim;
  task.block_size = kv.block_size;
  task.block_table = batch.block_tables + item.sequence * batch.max_blocks;
  return task;
}

// Gather the query rows of each item, attend, scatter the results to out [T, Hq, value_dim].
template <class Fill>
void attend_all(Context& ctx, const Batch& batch, const Cache& kv, const Shape& shape, float scale,
                Fill&& fill, float* out) {
  const std::vector<Item> items = cut(batch, shape);
  const int64_t rows = kMaxAttendRows;
  const int64_t floats = rows * (shape.key_dim + shape.value_dim) +
                         attend_scratch(rows, shape.key_dim, shape.value_dim);
  for (Scratch& scratch : ctx.thread_scratch) scratch.get<float>(floats);
  ctx.pool.for_each(static_cast<int64_t>(items.size()), [&](int64_t index, int thread) {
    const Item& item = items[static_cast<size_t>(index)];
    AttendTask task = make_task(batch, kv, shape, item, scale);
    float* q = ctx.thread_scratch[static_cast<size_t>(thread)].get<float>(floats);
    float* result = q + rows * shape.key_dim;
    const int64_t heads = task.rows_per_token;
    for (int64_t i = 0; i < item.tokens; ++i) {
      fill(item.first_token + i, item.first_row, heads, q + i * heads * shape.key_dim);
    }
    task.q = q;
    task.out = result;
    task.scratch = result + rows * shape.value_dim;
    ctx.kernels.attend(task);
    for (int64_t i = 0; i < item.tokens; ++i) {
      const int64_t to = (item.first_token + i) * shape.num_heads + item.first_row;
      std::copy_n(result + i * heads * shape.value_dim, heads * shape.value_dim,
                  out + to * shape.value_dim);
    }
  });
}

}  // namespace

void rope_kv_write(Context& ctx, const float* qkv, Rope rope, const Batch& batch, const Cache& kv,
                   int64_t num_heads, HeadNorm norm, float* q) {
  const Timed timed(ctx.times, Op::kRopeKvWrite);
  const int64_t dim = kv.dim, width = (num_heads + 2 * kv.heads) * dim;
  for (Scratch& scratch : ctx.thread_scratch) scratch.get<float>(dim);
  const Kernels& kernels = ctx.kernels;
  ctx.pool.for_each(batch.tokens, [&](int64_t t, int thread) {
    float* temporary = ctx.thread_scratch[static_cast<size_t>(thread)].get<float>(dim);
    const float* cos_sin = rope.table + batch.positions[t] * 2 * rope.half;
    const float* row = qkv + t * width;
    auto rotate = [&](const float* x, const float* weight, float* out) {
      if (weight != nullptr) {
        kernels.rms_norm_row(x, weight, dim, norm.eps, out);
        x = out;
      }
      kernels.rope_row(x, cos_sin, rope.half, dim, out);
    };
    for (int64_t h = 0; h < num_heads; ++h, row += dim) {
      rotate(row, norm.q_weight, q + (t * num_heads + h) * dim);
    }
    for (int64_t h = 0; h < kv.heads; ++h, row += dim) {
      rotate(row, norm.k_weight, temporary);
      write_row(kernels, kv.keys, kv.bf16, cache_offset(kv, batch.slots[t], h), temporary, dim);
    }
    for (int64_t h = 0; h < kv.heads; ++h, row += dim) {
      write_row(kernels, kv.values, kv.bf16, cache_offset(kv, batch.slots[t], h), row, dim);
    }
  });
}

void rope(Context& ctx, const float* x, Rope rope, const int32_t* positions, int64_t tokens,
          int64_t heads, int64_t dim, float* out) {
  const Timed timed(ctx.times, Op::kRope);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (t * heads + h) * dim;
      ctx.kernels.rope_row(x + at, rope.table + positions[t] * 2 * rope.half, rope.half, dim,
                           out + at);
    }
  }
}

void mla_kv_write(Context& ctx, const float* latent, int64_t rank, const float* k_rope,
                  const Batch& batch, const Cache& kv) {
  const Timed timed(ctx.times, Op::kMlaKvWrite);
  const int64_t rope_dim = kv.dim - rank;
  for (int64_t t = 0; t < batch.tokens; ++t) {
    const int64_t at = cache_offset(kv, batch.slots[t], 0);
    write_row(ctx.kernels, kv.keys, kv.bf16, at, latent + t * rank, rank);
    write_row(ctx.kernels, kv.keys, kv.bf16, at + rank, k_rope + t * rope_dim, rope_dim);
  }
}

void paged_attention(Context& ctx, const float* q, const Batch& batch, const Cache& kv,
                     int64_t num_heads, float scale, float* out) {
  const Timed timed(ctx.times, Op::kPagedAttention);
  auto fill = [&](int64_t token, int64_t head, int64_t count, float* row) {
    std::copy_n(q + (token * num_heads + head) * kv.dim, count * kv.dim, row);
  };
  attend_all(ctx, batch, kv, {num_heads, kv.heads, kv.dim, kv.dim}, scale, fill, out);
}

void mla_attention(Context& ctx, const float* q_latent, int64_t rank, const float* q_rope,
                   const Batch& batch, const Cache& kv, int64_t num_heads, float scale,
                   float* out) {
  const Timed timed(ctx.times, Op::kMlaAttention);
  const int64_t rope_dim = kv.dim - rank;
  auto fill = [&](int64_t token, int64_t head, int64_t count, float* row) {
    for (int64_t h = token * num_heads + head; count > 0; ++h, --count, row += kv.dim) {
      std::copy_n(q_latent + h * rank, rank, row);
      std::copy_n(q_rope + h * rope_dim, rope_dim, row + rank);
    }
  };
  attend_all(ctx, batch, kv, {num_heads, 1, kv.dim, rank}, scale, fill, out);
}

}  // namespace xds
