// The operators on raw pointers: the contract of xdeepserve/ops/contract.py, arguments already
// checked by the bindings. All arrays are C-contiguous. See contract.py for what each one computes.
#pragma once

#include <cstdint>

#include "context.h"
#include "layout.h"

namespace xds {

// -- dense (dense.cc, head.cc) --------------------------------------------------------------------

void pack_weight(Context& ctx, const float* values, const Weight& shape, uint8_t* out);

// A table or cache that holds float32, or bfloat16 bits.
struct Elements {
  const void* data;
  bool bf16;
};

void embed(Context& ctx, Elements table, int64_t width, const int32_t* ids, int64_t tokens,
           float* out);
void linear(Context& ctx, const float* x, int64_t rows, const Weight& w, const float* bias,
            float* out);
// ids [num_greedy]: the best output of each of the first rows; logits: all outputs of the others.
void lm_head(Context& ctx, const float* x, int64_t rows, const Weight& w, int64_t num_greedy,
             int32_t* ids, float* logits);
void grouped_linear(Context& ctx, const float* x, int64_t tokens, const Weight& w, float* out);
void rms_norm(Context& ctx, const float* x, const float* weight, int64_t rows, int64_t n, float eps,
              float* out);
void add_rms_norm(Context& ctx, const float* residual, const float* x, const float* weight,
                  int64_t rows, int64_t n, float eps, float* sum, float* out);
// out = a + b, which may be one of them.
void add_rows(Context& ctx, const float* a, const float* b, int64_t rows, int64_t n, float* out);
void quantize_rows(Context& ctx, const float* x, int64_t rows, int64_t n, int8_t* out,
                   float* scales);
// counts [gate_up.groups] are rows per expert and sum to the rows of x; one group = plain SwiGLU.
void expert_mlp(Context& ctx, const float* x, const int32_t* counts, const Weight& gate_up,
                const Weight& down, float* out);

// -- attention (attention.cc) ---------------------------------------------------------------------

struct Batch {
  int64_t tokens;
  int64_t sequences;
  int64_t max_blocks;
  const int32_t* query_start;
  const int32_t* seq_lens;
  const int32_t* block_tables;
  const int32_t* positions;
  const int32_t* slots;
};

struct Cache {
  void* keys;    // [blocks, heads, dim, block_size]; MLA: [blocks, 1, block_size, dim]
  void* values;  // [blocks, heads, block_size, dim]; null for MLA
  float* scales;  // int8: [blocks, heads, 2, block_size], of keys and of values; else null
  KvType type;
  int64_t blocks;
  int64_t heads;
  int64_t block_size;
  int64_t dim;
};

struct HeadNorm {
  const float* q_weight;  // null: no norm
  const float* k_weight;
  float eps;
};

struct Rope {
  const float* table;  // [max_positions, 2 * half]
  int64_t half;
};

void rope_kv_write(Context& ctx, const float* qkv, Rope rope, const Batch& batch, const Cache& kv,
                   int64_t num_heads, HeadNorm norm, float* q);
void rope(Context& ctx, const float* x, Rope rope, const int32_t* positions, int64_t tokens,
          int64_t heads, int64_t dim, float* out);
void mla_kv_write(Context& ctx, const float* latent, int64_t rank, const float* k_rope,
                  const Batch& batch, const Cache& kv);
void paged_attention(Context& ctx, const float* q, const Batch& batch, const Cache& kv,
                     int64_t num_heads, float scale, float* out);
void mla_attention(Context& ctx, const float* q_latent, int64_t rank, const float* q_rope,
                   const Batch& batch, const Cache& kv, int64_t num_heads, float scale, float* out);

// -- experts (routing.cc) -------------------------------------------------------------------------

struct Gate {
  int64_t num_experts;
  int64_t top_k;
  bool sigmoid;
  bool renormalize;
  int64_t num_groups;
  int64_t topk_groups;
  float scaling;
};

void gate_topk(Context& ctx, const float* logits, int64_t tokens, const Gate& gate,
               const float* bias, int32_t* ids, float* weights);
void combine_topk(Context& ctx, const float* rows, int64_t width, const int32_t* row_of_slot,
                  const float* weights, int64_t tokens, int64_t top_k, float* out);

// -- sampling (penalties.cc, sampling.cc) ---------------------------------------------------------

struct Ids {
  const int32_t* data;
  int64_t count;
};

struct Penalties {
  float repetition;  // 1 = off
  float frequency;
  float presence;
};

// In place on one row; returns how many distinct ids there are, and writes them and their former
// logits to `ids` and `raw`, which have room for all of prompt and output.
int64_t penalize(Context& ctx, float* logits, int64_t vocab, Ids prompt, Ids output,
                 const Penalties& penalties, int32_t* ids, float* raw);

struct Sampling {
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const double* uniform;
};

void sample(Context& ctx, const float* logits, int64_t rows, int64_t vocab, const Sampling& params,
            int32_t* out);
void top_logprobs(Context& ctx, const float* logits, int64_t rows, int64_t vocab,
                  const int32_t* ids, int64_t num_top, float* chosen, int32_t* top_ids,
                  float* top_values);

// -- what this machine can do (ceiling.cc) --------------------------------------------------------

// Bytes read per second from memory, all threads of the context together.
double read_bandwidth(Context& ctx, int64_t bytes, int repeats);
// Multiply-adds * 2 per second of the GEMM kernel on data that fits the first caches.
double gemm_peak(Context& ctx, DType dtype, int repeats);

}  // namespace xds
