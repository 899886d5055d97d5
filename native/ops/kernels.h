// The table of single-threaded kernels that each instruction set provides.
//
// One source (kernels_*.inl) is compiled once per instruction set over a 16-lane vector type; the
// lanes, the order of every reduction and the polynomial of exp are the same everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace xds {

// Of one group of 32 k of a row that the 4-bit GEMM reads: 32 int8 values of each group, zero beyond
// the end of the row, then these of each group.
struct Int4Factors {
  float scale;
  float sum;  // scale * sum of values: what multiplies a weight's low
};

inline constexpr int64_t kInt4RowBytes = kInt4Group + sizeof(Int4Factors);  // of one group

inline const Int4Factors* int4_factors_of(const uint8_t* row, int64_t groups) {
  return reinterpret_cast<const Int4Factors*>(row + groups * kInt4Group);
}

// Of one group of 64 k of a w8a8g64 row: all its int8 values, zero beyond the end of the row, come
// first, then these of each group.
struct Int8Factors {
  float scale;
  int32_t offset;  // -128 * sum of values: undoes what weight + 128 adds
};

inline constexpr int64_t kInt8GroupBytes = kInt8Group + sizeof(Int8Factors);

inline const Int8Factors* int8_factors_of(const uint8_t* row, int64_t groups) {
  return reinterpret_cast<const Int8Factors*>(row + groups * kInt8Group);
}

// One panel of a GEMM: c[rows, cols] = a[rows, k] times up to 32 output features (+ bias).
struct PanelTask {
  const uint8_t* a;      // prepared activations: float32, or prepare_bf16 / quantize_row /
                         // split_row / prepare_int4 / prepare_w8a8 rows; all but float32 ones are followed by
                         // kRowSlack more that may be read, whatever they hold
  ptrdiff_t a_stride;    // bytes between rows
  int64_t rows;          // at most kRowChunk
  const uint8_t* b;      // panel, see layout.h
  int64_t steps;         // k-steps of the panel
  const uint8_t* next;   // a panel that will be read soon after, or null
  float* c;
  ptrdiff_t c_stride;    // floats between rows
  int64_t cols;          // 1 to 32
  const float* bias;     // [cols] or null
  // int8, w8a16; w8a8g64 has col_scale only:
  const float* row_scale;
  ptrdiff_t row_scale_stride;
  const float* col_scale;
  const int32_t* col_sum;
  ptrdiff_t a_fine;      // w8a16: bytes from the coarse values of a row to its fine ones
};

// What a KV cache holds: float32, bfloat16 bits, or int8 that is multiplied by a scale per row.
enum class KvType : uint8_t { kFloat32, kBf16, kInt8 };

inline constexpr int64_t kv_bytes(KvType type) {
  return type == KvType::kFloat32 ? 4 : type == KvType::kBf16 ? 2 : 1;
}

// Attention of some query rows of one sequence over one head of its paged cache.
struct AttendTask {
  const float* const* q;   // [rows] query rows of key_dim floats
  float* const* out;       // [rows] where value_dim floats go
  int64_t rows;            // tokens * rows_per_token
  int64_t rows_per_token;  // query heads that share the kv head
  int64_t first_length;    // positions seen by the first token; each next one sees one more
  int64_t key_dim;
  int64_t value_dim;
  float scale;
  const void* keys;        // cache at (block 0, this head): [key_dim, block_size]
  const void* values;      // [block_size, value_dim]; null: one row [key_dim] is key and value
  KvType type;
  const float* scales;     // int8: at (block 0, this head) [2, block_size], of keys and of values
  int64_t scale_stride;    // floats between blocks
  int64_t block_stride;    // elements between blocks
  int64_t block_size;
  const int32_t* block_table;
  int64_t first_partition;  // of the context, see kPartition
  int64_t stop_partition;
  float* parts;            // null: all partitions are here; else [partition, row, part_floats]
  float* scratch;          // attend_scratch() floats
};

inline constexpr int64_t kRowSlack = 31;    // rows of activations that a GEMM may read past its own
inline constexpr int64_t kRowChunk = 128;   // most rows of a PanelTask; the panel stays in cache
inline constexpr int64_t kPartition = 256;      // positions of one attention partition
inline constexpr int64_t kKeyTile = 64;         // positions whose scores are computed together
inline constexpr int64_t kMaxAttendRows = 256;  // query rows of one task

// One row's softmax over one partition: weighted values (padded to 16), maximum, sum.
inline int64_t part_floats(int64_t value_dim) { return (value_dim + 15) / 16 * 16 + 16; }

// Floats of scratch that a task needs, whatever the kernels.
inline int64_t attend_scratch(int64_t rows, int64_t key_dim, int64_t value_dim) {
  const int64_t padded = rows + kRowSlack + 1, key_pad = (key_dim + 31) / 32 * 32;
  return padded * (kPartition + key_pad + 2 * part_floats(value_dim)) + key_pad * (kKeyTile + kPartition / 2) +
         32 * kPartition + 9 * 16;
}

// The largest of some entries: the lowest id that has it.
struct Best {
  float value;
  int32_t id;
};

inline constexpr Best kNoBest{-__builtin_inff(), INT32_MAX};  // before any entry

struct Kernels {
  const char* name;
  bool s8_offset;  // int8 activations of panel_gemm are stored as value + 128
  int64_t bf16_item;  // bytes per element of a prepare_bf16 row (2 or 4)

  void (*begin_operator)();  // on the calling thread: foreign code may have run on it before

  void (*panel_gemm[kDTypes])(const PanelTask& task);  // by DType
  // Round a row to bf16 in the form panel_gemm reads, padded with zero to an even length.
  void (*prepare_bf16)(const float* x, int64_t n, void* out);
  // Quantize a row to [-127, 127]; returns the scale.
  float (*quantize_row)(const float* x, int64_t n, int8_t* out);
  // Quantize a row to 15 bits, 128 * coarse + fine; returns the scale of the coarse values.
  float (*split_row)(const float* x, int64_t n, int8_t* coarse, int8_t* fine);
  // Quantize each group of 32, or of 64, of a row on its own.
  void (*prepare_int4)(const float* x, int64_t n, uint8_t* out);
  void (*prepare_w8a8)(const float* x, int64_t n, uint8_t* out);

  void (*rms_norm_row)(const float* x, const float* weight, int64_t n, float eps, float* out);
  void (*add_row)(const float* a, const float* b, int64_t n, float* out);
  void (*axpy_row)(float factor, const float* x, int64_t n, float* sum);
  void (*silu_mul_row)(const float* gate, const float* up, int64_t n, float* out);
  // Rotate the first 2 * half entries in halves; cos_sin is [2 * half]. May work in place.
  void (*rope_row)(const float* x, const float* cos_sin, int64_t half, int64_t n, float* out);
  void (*to_bf16_row)(const float* x, int64_t n, uint16_t* out);
  void (*from_bf16_row)(const uint16_t* x, int64_t n, float* out);

  int64_t attend_rows;  // query rows wanted per task: enough to reuse what is read
  void (*attend)(const AttendTask& task);
  // Merge the parts that tasks over all partitions left behind, and write the result.
  void (*merge_parts)(const AttendTask& task);

  void (*softmax_row)(const float* x, int64_t n, float* out);
  void (*sigmoid_row)(const float* x, int64_t n, float* out);
  float (*max_row)(const float* x, int64_t n);
  // out = exp((x - shift) / divisor)
  void (*exp_row)(const float* x, int64_t n, float shift, float divisor, float* out);
  // The sum of exp((x - shift) / divisor).
  double (*exp_sum_row)(const float* x, int64_t n, float shift, float divisor);
  // Replace best[row] by the best of it and row `row` of x, whose entries have ids from first_id.
  void (*argmax_rows)(const float* x, ptrdiff_t stride, int64_t rows, int64_t n, int64_t first_id,
                      Best* best);
  // Ascending ids of the entries with low <= x < high; returns how many. May write one id too many.
  int64_t (*collect_row)(const float* x, int64_t n, float low, float high, int32_t* out);
  // The ids of the `count` <= n largest entries, best first, ties by lower id.
  void (*best_row)(const float* x, int64_t n, int64_t count, int32_t* out);
  // Sum of n floats, in any order: a memory read as fast as the core can.
  float (*read_floats)(const float* x, int64_t n);
};

const Kernels& portable_kernels();
#if defined(XDS_HAVE_AVX2)
const Kernels& avx2_kernels();
#endif
#if defined(XDS_HAVE_AVX512)
const Kernels& avx512_kernels();
#endif
#if defined(XDS_HAVE_AMX)
const Kernels& amx_kernels();
#endif

// The kernels `name` ("portable", "avx2", "avx512", "amx", or "auto" for the best), or null when this
// machine or this build does not have them.
const Kernels* find_kernels(const char* name);

}  // namespace xds
