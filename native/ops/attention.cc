// Attention operators: cutting a batch into tasks, rotation, writes into the paged cache.
#include <algorithm>
#include <vector>

#include "for_rows.h"
#include "ops.h"

namespace xds {
namespace {

constexpr int64_t kItemsPerThread = 8;  // fewer are cut along the context
constexpr int64_t kMaxPartFloats = int64_t{1} << 23;  // memory for parts of contexts, 32 MiB
constexpr int64_t kNoParts = -1;

// Some tokens of one sequence and one kv head.
struct Item {
  int64_t sequence;
  int64_t first_token;
  int64_t tokens;
  int64_t head;       // kv head
  int64_t first_row;  // of the query heads
  int64_t heads;      // query heads
  int64_t length;     // positions that the first token sees
  int64_t parts;      // offset of its parts, if it is cut along the context

  int64_t rows() const { return tokens * heads; }
  int64_t partitions() const { return (length + tokens - 2) / kPartition + 1; }
};

// Partitions of the context of one item: what one thread does at a time.
struct Span {
  int64_t item;
  int64_t first;
  int64_t stop;
};

struct Shape {
  int64_t num_heads;
  int64_t kv_heads;
  int64_t key_dim;
  int64_t value_dim;

  int64_t group() const { return num_heads / kv_heads; }
};

const void* at_offset(const void* base, KvType type, int64_t elements) {
  return static_cast<const uint8_t*>(base) + elements * kv_bytes(type);
}

// Where the row of `slot` begins in a cache of rows [blocks, heads, block_size, dim].
int64_t row_offset(const Cache& kv, int64_t slot, int64_t head) {
  const int64_t block = slot / kv.block_size, row = slot % kv.block_size;
  return ((block * kv.heads + head) * kv.block_size + row) * kv.dim;
}

// The scales of `slot` in an int8 cache: of its key, and block_size further of its value.
float* scale_of(const Cache& kv, int64_t slot, int64_t head) {
  const int64_t block = slot / kv.block_size, row = slot % kv.block_size;
  return kv.scales + (block * kv.heads + head) * 2 * kv.block_size + row;
}

void write_value(const Kernels& kernels, const Cache& kv, int64_t slot, int64_t head,
                 const float* value) {
  const int64_t offset = row_offset(kv, slot, head);
  switch (kv.type) {
    case KvType::kFloat32:
      std::copy_n(value, kv.dim, static_cast<float*>(kv.values) + offset);
      return;
    case KvType::kBf16:
      return kernels.to_bf16_row(value, kv.dim, static_cast<uint16_t*>(kv.values) + offset);
    case KvType::kInt8:
      scale_of(kv, slot, head)[kv.block_size] =
          kernels.quantize_row(value, kv.dim, static_cast<int8_t*>(kv.values) + offset);
  }
}

// `n` entries of a latent row.
void write_latent(const Kernels& kernels, const Cache& kv, int64_t offset, const float* row,
                  int64_t n) {
  if (kv.type == KvType::kBf16) {
    kernels.to_bf16_row(row, n, static_cast<uint16_t*>(kv.keys) + offset);
  } else {
    std::copy_n(row, n, static_cast<float*>(kv.keys) + offset);
  }
}

template <class T>
void write_column(const T* column, int64_t n, int64_t stride, T* out) {
  for (int64_t d = 0; d < n; ++d) out[d * stride] = column[d];
}

// Write a key into the transposed cache [blocks, heads, dim, block_size]; `scratch` holds dim floats.
void write_key(const Kernels& kernels, const Cache& kv, int64_t slot, int64_t head,
               const float* key, void* scratch) {
  const int64_t block = slot / kv.block_size;
  const int64_t offset =
      (block * kv.heads + head) * kv.dim * kv.block_size + slot % kv.block_size;
  switch (kv.type) {
    case KvType::kFloat32:
      return write_column(key, kv.dim, kv.block_size, static_cast<float*>(kv.keys) + offset);
    case KvType::kBf16: {
      auto* bits = static_cast<uint16_t*>(scratch);
      kernels.to_bf16_row(key, kv.dim, bits);
      return write_column(bits, kv.dim, kv.block_size, static_cast<uint16_t*>(kv.keys) + offset);
    }
    case KvType::kInt8: {
      auto* bytes = static_cast<int8_t*>(scratch);
      *scale_of(kv, slot, head) = kernels.quantize_row(key, kv.dim, bytes);
      write_column(bytes, kv.dim, kv.block_size, static_cast<int8_t*>(kv.keys) + offset);
    }
  }
}

// A group of query heads larger than this is cut: query rows do not depend on each other.
int64_t heads_per_item(int64_t group) { return std::min<int64_t>(group, kMaxAttendRows); }

std::vector<Item> cut(const Batch& batch, const Shape& shape, int64_t rows_wanted) {
  std::vector<Item> items;
  const int64_t group = shape.group(), heads = heads_per_item(group);
  const int64_t tile = std::max<int64_t>(1, rows_wanted / heads);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int64_t stop = batch.query_start[b + 1];
    for (int64_t t = batch.query_start[b]; t < stop; t += tile) {
      const int64_t length = batch.seq_lens[b] - (stop - t) + 1;
      for (int64_t head = 0; head < shape.kv_heads; ++head) {
        for (int64_t row = 0; row < group; row += heads) {
          items.push_back({b, t, std::min(tile, stop - t), head, head * group + row,
                           std::min(heads, group - row), length, kNoParts});
        }
      }
    }
  }
  return items;
}

// Items as they are, or, where there are too few for the threads, cut along the context. The parts
// of a cut item go to parts[item.parts]; `part_count` is how many floats there are of them.
std::vector<Span> share_out(std::vector<Item>& items, int threads, int64_t floats_per_row,
                            int64_t& part_count) {
  int64_t total = 0;
  for (const Item& item : items) total += item.partitions();
  const int64_t wanted = threads == 1 ? 1 : threads * kItemsPerThread;
  const int64_t longest = static_cast<int64_t>(items.size()) >= wanted
                              ? total : std::max<int64_t>(1, total / wanted);
  std::vector<Span> spans;
  spans.reserve(items.size());
  part_count = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t partitions = items[i].partitions();
    const int64_t floats = partitions * items[i].rows() * floats_per_row;
    const bool is_cut = partitions > longest && part_count + floats <= kMaxPartFloats;
    if (is_cut) {
      items[i].parts = part_count;
      part_count += floats;
    }
    const int64_t step = is_cut ? longest : partitions;
    for (int64_t p = 0; p < partitions; p += step) {
      spans.push_back({static_cast<int64_t>(i), p, std::min(p + step, partitions)});
    }
  }
  return spans;
}

// One thread's view of an attention operator: rows by pointer, nothing copied.
struct Rows {
  const float* q[kMaxAttendRows];
  float* out[kMaxAttendRows];
};

AttendTask make_task(const Batch& batch, const Cache& kv, const Shape& shape, const Item& item,
                     float scale, float* out, Rows& rows) {
  AttendTask task{};
  task.rows_per_token = item.heads;
  task.rows = item.rows();
  task.first_length = item.length;
  task.key_dim = shape.key_dim;
  task.value_dim = shape.value_dim;
  task.scale = scale;
  const int64_t head_offset = item.head * kv.block_size * kv.dim;
  task.keys = at_offset(kv.keys, kv.type, head_offset);
  if (kv.values != nullptr) task.values = at_offset(kv.values, kv.type, head_offset);
  task.type = kv.type;
  if (kv.scales != nullptr) task.scales = kv.scales + item.head * 2 * kv.block_size;
  task.scale_stride = kv.heads * 2 * kv.block_size;
  task.block_stride = kv.heads * kv.block_size * kv.dim;
  task.block_size = kv.block_size;
  task.block_table = batch.block_tables + item.sequence * batch.max_blocks;
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t token = item.first_token + r / item.heads;
    const int64_t head = item.first_row + r % item.heads;
    rows.out[r] = out + (token * shape.num_heads + head) * shape.value_dim;
  }
  task.q = rows.q;
  task.out = rows.out;
  return task;
}

// query(token, first query head, count, rows, memory) sets `rows` to the query rows of one token;
// it may build them in `memory`.
template <class Query>
void attend_all(Context& ctx, const Batch& batch, const Cache& kv, const Shape& shape, float scale,
                Query&& query, float* out) {
  std::vector<Item> items = cut(batch, shape, ctx.kernels.attend_rows);
  int64_t part_count = 0;
  const std::vector<Span> spans =
      share_out(items, ctx.pool.size(), part_floats(shape.value_dim), part_count);
  float* parts = part_count > 0 ? ctx.rows.get<float>(part_count) : nullptr;
  int64_t most_rows = 0;
  for (const Item& item : items) most_rows = std::max(most_rows, item.rows());
  const int64_t query_floats = most_rows * shape.key_dim;
  const int64_t floats =
      query_floats + attend_scratch(most_rows, shape.key_dim, shape.value_dim);
  for (Scratch& scratch : ctx.thread_scratch) scratch.get<float>(floats);
  auto prepare = [&](const Item& item, int thread, Rows& rows) {
    AttendTask task = make_task(batch, kv, shape, item, scale, out, rows);
    Scratch& scratch = ctx.thread_scratch[static_cast<size_t>(thread)];
    task.scratch = scratch.get<float>(floats) + query_floats;
    if (item.parts != kNoParts) task.parts = parts + item.parts;
    return task;
  };
  // Late tokens see most; a thread that is done with early ones takes the last ones of others.
  ctx.pool.for_each_in_shares(static_cast<int64_t>(spans.size()), [&](int64_t index, int thread) {
    const Span& span = spans[static_cast<size_t>(index)];
    const Item& item = items[static_cast<size_t>(span.item)];
    Rows rows;
    AttendTask task = prepare(item, thread, rows);
    float* memory = task.scratch - query_floats;
    for (int64_t i = 0; i < item.tokens; ++i) {
      query(item.first_token + i, item.first_row, item.heads, rows.q + i * item.heads,
            memory + i * item.heads * shape.key_dim);
    }
    task.first_partition = span.first;
    task.stop_partition = span.stop;
    ctx.kernels.attend(task);
  });
  if (part_count == 0) return;
  ctx.pool.for_each(static_cast<int64_t>(items.size()), [&](int64_t index, int thread) {
    const Item& item = items[static_cast<size_t>(index)];
    if (item.parts == kNoParts) return;
    Rows rows;
    ctx.kernels.merge_parts(prepare(item, thread, rows));
  });
}

}  // namespace

void rope_kv_write(Context& ctx, const float* qkv, Rope rope, const Batch& batch, const Cache& kv,
                   int64_t num_heads, HeadNorm norm, float* q) {
  const Timed timed(ctx.times, Op::kRopeKvWrite);
  const int64_t dim = kv.dim, width = (num_heads + 2 * kv.heads) * dim;
  for (Scratch& scratch : ctx.thread_scratch) scratch.get<float>(2 * dim);
  const Kernels& kernels = ctx.kernels;
  auto write_token = [&](int64_t t, float* key) {
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
      rotate(row, norm.k_weight, key);
      write_key(kernels, kv, batch.slots[t], h, key, key + dim);
    }
    for (int64_t h = 0; h < kv.heads; ++h, row += dim) {
      write_value(kernels, kv, batch.slots[t], h, row);
    }
  };
  // Neighbours share cache lines of keys, so one thread writes several.
  const int64_t chunk = std::clamp<int64_t>(batch.tokens / (4 * ctx.pool.size()), 1, 16);
  ctx.pool.for_each_in_shares((batch.tokens + chunk - 1) / chunk, [&](int64_t index, int thread) {
    float* key = ctx.thread_scratch[static_cast<size_t>(thread)].get<float>(2 * dim);
    const int64_t stop = std::min(batch.tokens, (index + 1) * chunk);
    for (int64_t t = index * chunk; t < stop; ++t) write_token(t, key);
  });
}

void rope(Context& ctx, const float* x, Rope rope, const int32_t* positions, int64_t tokens,
          int64_t heads, int64_t dim, float* out) {
  const Timed timed(ctx.times, Op::kRope);
  for_rows(ctx, tokens, heads * dim, [&](int64_t t, int) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (t * heads + h) * dim;
      ctx.kernels.rope_row(x + at, rope.table + positions[t] * 2 * rope.half, rope.half, dim,
                           out + at);
    }
  });
}

void mla_kv_write(Context& ctx, const float* latent, int64_t rank, const float* k_rope,
                  const Batch& batch, const Cache& kv) {
  const Timed timed(ctx.times, Op::kMlaKvWrite);
  const int64_t rope_dim = kv.dim - rank;
  for_rows(ctx, batch.tokens, kv.dim, [&](int64_t t, int) {
    const int64_t at = row_offset(kv, batch.slots[t], 0);
    write_latent(ctx.kernels, kv, at, latent + t * rank, rank);
    write_latent(ctx.kernels, kv, at + rank, k_rope + t * rope_dim, rope_dim);
  });
}

void paged_attention(Context& ctx, const float* q, const Batch& batch, const Cache& kv,
                     int64_t num_heads, float scale, float* out) {
  const Timed timed(ctx.times, Op::kPagedAttention);
  auto query = [&](int64_t token, int64_t head, int64_t count, const float** rows, float*) {
    for (int64_t i = 0; i < count; ++i) rows[i] = q + (token * num_heads + head + i) * kv.dim;
  };
  attend_all(ctx, batch, kv, {num_heads, kv.heads, kv.dim, kv.dim}, scale, query, out);
}

void mla_attention(Context& ctx, const float* q_latent, int64_t rank, const float* q_rope,
                   const Batch& batch, const Cache& kv, int64_t num_heads, float scale,
                   float* out) {
  const Timed timed(ctx.times, Op::kMlaAttention);
  const int64_t rope_dim = kv.dim - rank;
  auto query = [&](int64_t token, int64_t head, int64_t count, const float** rows, float* memory) {
    for (int64_t i = 0; i < count; ++i, memory += kv.dim) {
      const int64_t row = token * num_heads + head + i;
      std::copy_n(q_latent + row * rank, rank, memory);
      std::copy_n(q_rope + row * rope_dim, rope_dim, memory + rank);
      rows[i] = memory;
    }
  };
  attend_all(ctx, batch, kv, {num_heads, 1, kv.dim, rank}, scale, query, out);
}

}  // namespace xds
