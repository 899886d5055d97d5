#include "rows.h"

#include <algorithm>
#include <cstring>

namespace xds::xccl {
namespace {

bool get_buffer(nb::handle array, int flags, Py_buffer& view) {
  if (PyObject_GetBuffer(array.ptr(), &view, flags) == 0) return true;
  PyErr_Clear();
  view.obj = nullptr;
  return false;
}

RowType row_type(char format) {
  switch (format) {
    case 'f':
      return RowType::kFloat32;
    case 'H':
      return RowType::kBfloat16;
    case 'b':
      return RowType::kInt8;
    default:
      return RowType::kBytes;
  }
}

nb::dlpack::dtype item_type(RowType type) {
  switch (type) {
    case RowType::kFloat32:
      return nb::dtype<float>();
    case RowType::kBfloat16:
      return nb::dtype<uint16_t>();
    case RowType::kInt8:
      return nb::dtype<int8_t>();
    case RowType::kBytes:
      break;
  }
  return nb::dtype<uint8_t>();
}

}  // namespace

ArrayView::ArrayView(nb::handle array, const char* name, int ndim, const char* formats, Use use) {
  const int writable = use == Use::kWrite ? PyBUF_WRITABLE : 0;
  const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | writable;
  if (!get_buffer(array, flags, view_) && use == Use::kRead) {
    const nb::object copy = nb::module_::import_("numpy").attr("ascontiguousarray")(array);
    get_buffer(copy, flags, view_);
  }
  const bool is_plain = is_held() && view_.ndim == ndim && view_.format != nullptr &&
                        std::strlen(view_.format) == 1;
  if (is_plain && std::strchr(formats, view_.format[0]) != nullptr) {
    format_ = view_.format[0];
    std::copy_n(view_.shape, ndim, shape_.begin());
    return;
  }
  drop();
  throw nb::type_error((std::string(name) + " must be a C-contiguous" +
                        (writable != 0 ? ", writable" : "") + " array of " +
                        std::to_string(ndim) + " dimensions and of an item type in '" + formats +
                        "'")
                           .c_str());
}

nb::object tag_object(const Tag& tag) {
  return nb::module_::import_("xdeepserve.xccl.layout")
      .attr("Tag")(tag.epoch, tag.step_idx, tag.layer_idx, tag.microbatch_idx);
}

ArrayView scales_view(nb::handle scales) {
  return scales.is_none() ? ArrayView() : ArrayView(scales, "scales", 1, kFloats);
}

RowSource row_source(const ArrayView& rows, const ArrayView& scales, bool quantize) {
  RowSource source;
  source.type = row_type(rows.format());
  if (rows.shape(0) > UINT32_MAX || rows.shape(1) > (uint64_t{1} << 28)) {
    throw nb::value_error("rows have at most 2**32 - 1 rows of 2**28 items");
  }
  source.rows = rows.data<const uint8_t>();
  source.num_rows = static_cast<uint32_t>(rows.shape(0));
  source.width = static_cast<uint32_t>(rows.shape(1));
  source.quantize = quantize;
  const bool is_int8 = source.type == RowType::kInt8;
  if (is_int8 != scales.is_held()) {
    throw nb::value_error("int8 rows come with one float32 scale each, others without");
  }
  if (quantize && (is_int8 || source.type == RowType::kBytes)) {
    throw nb::value_error("only float32 and bfloat16 rows can be quantized");
  }
  if (is_int8 && scales.shape(0) != rows.shape(0)) {
    throw nb::value_error("scales must have one entry per row");
  }
  if (is_int8) source.scales = scales.data<const float>();
  return source;
}

nb::object view_rows(const uint8_t* rows, RowType type, uint32_t num_rows, uint32_t row_bytes,
                     nb::handle keeper) {
  using View = nb::ndarray<nb::numpy, nb::ro, nb::ndim<2>>;
  return nb::cast(
      View(rows, {num_rows, row_bytes / item_bytes(type)}, keeper, {}, item_type(type)));
}

nb::object view_scales(const uint8_t* scales, RowType type, uint32_t num_rows, nb::handle keeper) {
  if (type != RowType::kInt8) return nb::none();
  using View = nb::ndarray<nb::numpy, const float, nb::ndim<1>>;
  return nb::cast(View(reinterpret_cast<const float*>(scales), {num_rows}, keeper));
}

}  // namespace xds::xccl
