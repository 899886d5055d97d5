// A request as the answering rank holds it in Python: views into the asker's slot, and ways to answer.
#pragma once

#include "rows.h"

namespace xds::xccl {

class PyBatch {
 public:
  PyBatch(nb::object port, const Incoming& request);

  const Incoming& request() const { return request_; }
  nb::object tag() const { return tag_object(request_.tag); }
  nb::object meta() const;
  nb::object pairs() const;
  nb::object rows() const {
    return view_rows(base_ + request_.rows_offset, request_.row_type, request_.num_rows,
                     request_.row_bytes, keeper_);
  }
  nb::object scales() const {
    return view_scales(base_ + request_.scales_offset, request_.row_type, request_.num_rows,
                       keeper_);
  }

  // False, or None, when the asker's life has ended and nobody waits for the answer.
  bool reply(nb::handle rows, nb::handle scales, bool quantize);
  bool copy_answer(const RowSource& source);  // in a turn of the port
  nb::object answer_buffer(uint32_t num_rows, uint32_t width);
  bool commit(uint32_t num_rows, uint32_t width);
  bool refuse(uint32_t detail);

 private:
  Status place(const Answer& answer, uint64_t& scales_offset, uint64_t& rows_offset) const;
  Status publish(const Answer& answer);
  bool settle(Status status, const Answer& answer) const;

  nb::object owner_, keeper_;  // the port; what keeps the asker's segment mapped
  Port& port_;
  const uint8_t* base_;  // of the asker's segment
  Incoming request_;
};

std::vector<PyBatch> batches_of(nb::handle port, const std::vector<Incoming>& arrived);

}  // namespace xds::xccl
