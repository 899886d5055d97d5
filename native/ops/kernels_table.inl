// The kernels of one instruction set: included by isa_*.cc after its simd_*.h, all of it inside an
// anonymous namespace. No standard-library templates that the linker could share between files
// compiled for different machines.
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

#include "kernels_gemm.inl"
#include "kernels_rows.inl"
#include "kernels_select.inl"
#include "kernels_attend.inl"
#include "kernels_gemm4.inl"
#include "kernels_gemm8.inl"

// `attend`: the kernel of that name, as the instruction set has it.
constexpr Kernels make_table(const char* name, void (*attend)(const AttendTask&)) {
  Kernels table{};
  table.name = name;
  table.s8_offset = kS8Offset;
  table.bf16_item = kBf16Item;
  table.begin_operator = [] {};
  table.panel_gemm[0] = panel_gemm<F32Product, kFloatRows>;
  table.panel_gemm[1] = panel_gemm<Bf16Product, kBf16Rows>;
  table.panel_gemm[2] = panel_gemm<Int8Product, kInt8Rows>;
  table.panel_gemm[3] = int4_gemm;
  table.panel_gemm[4] = paired_gemm<panel_gemm<Int8Product, kInt8Rows>>;
  table.panel_gemm[5] = w8a8_gemm;
  table.prepare_bf16 = prepare_bf16;
  table.quantize_row = quantize_row;
  table.split_row = split_row;
  table.prepare_int4 = prepare_int4;
  table.prepare_w8a8 = prepare_w8a8;
  table.rms_norm_row = rms_norm_row;
  table.add_row = add_row;
  table.axpy_row = axpy_row;
  table.silu_mul_row = silu_mul_row;
  table.rope_row = rope_row;
  table.to_bf16_row = to_bf16_row;
  table.from_bf16_row = from_bf16_row;
  table.attend_rows = 64;
  table.attend = attend;
  table.merge_parts = merge_parts;
  table.softmax_row = softmax_row;
  table.sigmoid_row = sigmoid_row;
  table.max_row = max_row;
  table.exp_row = exp_row;
  table.exp_sum_row = exp_sum_row;
  table.argmax_rows = argmax_rows;
  table.collect_row = collect_row;
  table.best_row = best_row;
  table.read_floats = read_floats;
  return table;
}
