// Penalties on the logits of tokens that a sequence holds already: one pass over its ids.
#include "ops.h"

namespace xds {
namespace {

// What id_counts holds of an id: twice its occurrences in the output, plus this if it is in the
// prompt.
constexpr uint32_t kInPrompt = 1;

float penalized(float logit, uint32_t count, const Penalties& p) {
  if (p.repetition != 1.0f) logit = logit > 0 ? logit / p.repetition : logit * p.repetition;
  const uint32_t occurrences = count / 2;
  logit -= p.frequency * static_cast<float>(occurrences);
  if (occurrences > 0) logit -= p.presence;
  return logit;
}

}  // namespace

int64_t penalize(Context& ctx, float* logits, int64_t vocab, Ids prompt, Ids output,
                 const Penalties& penalties, int32_t* ids, float* raw) {
  std::vector<uint32_t>& counts = ctx.id_counts;
  if (static_cast<int64_t>(counts.size()) < vocab) counts.resize(static_cast<size_t>(vocab));
  int64_t distinct = 0;
  auto count_of = [&](int32_t id) -> uint32_t& {
    uint32_t& count = counts[static_cast<size_t>(id)];
    if (count == 0) ids[distinct++] = id;
    return count;
  };
  for (int64_t i = 0; i < output.count; ++i) count_of(output.data[i]) += 2;
  for (int64_t i = 0; i < prompt.count; ++i) count_of(prompt.data[i]) |= kInPrompt;
  for (int64_t i = 0; i < distinct; ++i) {
    const int32_t id = ids[i];
    raw[i] = logits[id];
    logits[id] = penalized(raw[i], counts[static_cast<size_t>(id)], penalties);
    counts[static_cast<size_t>(id)] = 0;
  }
  return distinct;
}

}  // namespace xds
