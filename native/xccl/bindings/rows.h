// Arrays of rows and tags as they cross from Python.
#pragma once

#include "port.h"

namespace xds::xccl {

using RowArray = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ScaleArray = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntArray = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// (epoch, step_idx, layer_idx, microbatch_idx)
using TagTuple = std::tuple<uint32_t, uint64_t, uint16_t, uint16_t>;

inline TagTuple tag_tuple(const Tag& tag) {
  return {tag.epoch, tag.step_idx, tag.layer_idx, tag.microbatch_idx};
}
inline Tag to_tag(const TagTuple& tuple) {
  return {.step_idx = std::get<1>(tuple),
          .epoch = std::get<0>(tuple),
          .layer_idx = std::get<2>(tuple),
          .microbatch_idx = std::get<3>(tuple)};
}

template <class T>
std::span<const T> span_of(const nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>& a) {
  return {a.data(), a.shape(0)};
}

RowSource row_source(const RowArray& rows, const std::optional<ScaleArray>& scales, bool quantize);

}  // namespace xds::xccl
