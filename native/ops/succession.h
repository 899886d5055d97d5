// Guesses which weight is read next: a model reads its weights in the same order every step.
#pragma once

#include <array>
#include <cstdint>

#include "layout.h"

namespace xds {

// Remembers what followed each weight last time. A guess only decides what is fetched early: that
// it is wrong, or that two weights share a slot, costs time and nothing else.
class Succession {
 public:
  // `weight` is read now. What was read after it last time, or null; valid until the next call.
  const Weight* follow(const Weight& weight) {
    if (latest_.data != nullptr) slot(latest_) = {latest_.data, weight};
    latest_ = weight;
    const Entry& entry = slot(weight);
    return entry.before == weight.data ? &entry.weight : nullptr;
  }

 private:
  static constexpr int kBits = 10;  // more weights than the dense parts of large models have

  struct Entry {
    const uint8_t* before = nullptr;
    Weight weight;
  };

  Entry& slot(const Weight& weight) {
    const uint64_t hash = reinterpret_cast<uintptr_t>(weight.data) * 0x9E3779B97F4A7C15u;
    return entries_[hash >> (64 - kBits)];
  }

  Weight latest_;
  std::array<Entry, 1 << kBits> entries_;
};

}  // namespace xds
