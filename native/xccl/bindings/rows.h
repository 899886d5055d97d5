// Arrays of rows and tags as they cross from Python, and views of rows as they cross to it.
#pragma once

#include <array>

#include "port.h"

namespace xds::xccl {

// A C-contiguous NumPy array as an argument, held by the buffer protocol: a quarter of the time that
// a DLPack capsule takes. A read-only argument of another order is copied.
class ArrayView {
 public:
  enum class Use { kRead, kWrite };

  ArrayView() = default;
  // `formats`: the item types that are allowed, as characters of the struct module.
  ArrayView(nb::handle array, const char* name, int ndim, const char* formats, Use use = Use::kRead);
  ~ArrayView() { drop(); }
  ArrayView(ArrayView&& other) noexcept { take(other); }
  ArrayView& operator=(ArrayView&& other) noexcept {
    drop();
    take(other);
    return *this;
  }

  bool is_held() const { return view_.obj != nullptr; }
  char format() const { return format_; }
  size_t shape(int axis) const { return shape_[axis]; }
  size_t size() const { return static_cast<size_t>(view_.len / view_.itemsize); }
  template <class T>
  T* data() const {
    return static_cast<T*>(view_.buf);
  }
  std::span<const int32_t> ints() const { return {data<const int32_t>(), size()}; }

 private:
  void drop() {
    if (is_held()) PyBuffer_Release(&view_);
  }
  void take(ArrayView& other) {
    view_ = other.view_;
    format_ = other.format_;
    shape_ = other.shape_;
    other.view_.obj = nullptr;
  }

  Py_buffer view_{};
  char format_ = 0;
  std::array<size_t, 2> shape_{};  // of its own: a view may point into itself
};

inline constexpr const char* kFloats = "f";
inline constexpr const char* kInts = "i";
inline constexpr const char* kRowItems = "fHbB";  // float32, bfloat16 bits, int8, bytes

// (epoch, step_idx, layer_idx, microbatch_idx)
using TagTuple = std::tuple<uint32_t, uint64_t, uint16_t, uint16_t>;

// An xdeepserve.xccl.layout.Tag.
nb::object tag_object(const Tag& tag);
inline Tag to_tag(const TagTuple& tuple) {
  return {.step_idx = std::get<1>(tuple),
          .epoch = std::get<0>(tuple),
          .layer_idx = std::get<2>(tuple),
          .microbatch_idx = std::get<3>(tuple)};
}

// Rows [T, width] and, with int8 rows, scales [T].
RowSource row_source(const ArrayView& rows, const ArrayView& scales, bool quantize);
ArrayView scales_view(nb::handle scales);  // of an array or None

// Views of a segment, which `keeper` keeps mapped.
nb::object view_rows(const uint8_t* rows, RowType type, uint32_t num_rows, uint32_t row_bytes,
                     nb::handle keeper);
nb::object view_scales(const uint8_t* scales, RowType type, uint32_t num_rows, nb::handle keeper);

}  // namespace xds::xccl
