// Where the time of a step goes: calls and nanoseconds by operator, counted at each operator's
// entry and exit. Two clock readings a call; only the thread that holds the context writes.
#pragma once

#include <chrono>
#include <cstdint>

namespace xds {

enum class Op {
  kEmbed, kLinear, kLmHead, kGroupedLinear, kNorm, kAddNorm, kAdd, kQuantize, kExpertMlp,
  kRopeKvWrite, kRope, kMlaSplit, kMlaKvWrite, kPagedAttention, kMlaAttention, kGate, kPermute, kCombine,
  kSample, kLogprobs, kCount
};

inline constexpr const char* kOpNames[] = {
    "embed",           "linear",        "lm_head",       "grouped_linear", "rms_norm",
    "add_rms_norm",    "add_rows",      "quantize_rows", "expert_mlp",     "rope_kv_write",
    "rope",            "mla_split",     "mla_kv_write",  "paged_attention", "mla_attention",
    "gate_topk",       "permute",       "combine_topk",  "sample",         "top_logprobs"};
static_assert(sizeof kOpNames / sizeof *kOpNames == static_cast<int>(Op::kCount));

struct OpTimes {
  struct Entry {
    int64_t calls = 0;
    int64_t ns = 0;
  };
  Entry entries[static_cast<int>(Op::kCount)];
};

// Counts its own lifetime.
class Timed {
 public:
  Timed(OpTimes& times, Op op)
      : entry_(times.entries[static_cast<int>(op)]), begin_(std::chrono::steady_clock::now()) {}
  ~Timed() {
    const auto spent = std::chrono::steady_clock::now() - begin_;
    entry_.ns += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
    ++entry_.calls;
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  OpTimes::Entry& entry_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace xds
