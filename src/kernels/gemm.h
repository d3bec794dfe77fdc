// What the two kinds of matrix product share: arguments, and the blocks they are cut into.
#pragma once

#include "kernels/kernels.h"

namespace detour::kernels {

inline constexpr int64_t kPanel = 32;  // outputs of a panel

/// Bytes of one block of a panel: its numbers, and all with scales and minima.
constexpr int64_t QuantNumberBytes(WeightFormat format) {
  return kPanel * (format == WeightFormat::kQ8 ? 32 : 16);
}
constexpr int64_t QuantBlockBytes(WeightFormat format) {
  return QuantNumberBytes(format) + kPanel * (format == WeightFormat::kQ4Min ? 4 : 2);
}

/// The arguments of one Gemm call.
struct GemmArgs {
  const float* x;
  int64_t ldx;
  const PackedMatrix* w;
  const float* bias;
  float* y;
  int64_t ldy;
  GemmForm form = {};
};

/// A block of the outputs: rows and panels.
struct GemmBlock {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

/// w[0, n), n <= 32, as a block of `format`: scale and min as PackedMatrix::Pack says, nearest q
/// by the inverse of the unrounded scale, as GGUF's own writer. (quantize.cc)
void QuantizeBlock(WeightFormat format, const float* w, int64_t n, QuantBlock* block);
/// to[i][m] = w[m][i] for `rows` rows m of `columns` numbers; strides ldw and ldt. (quantize.cc)
void Transpose(const float* w, int64_t ldw, int64_t rows, int64_t columns, float* to, int64_t ldt);

/// y[r][0, width) += bias for each row.
void AddBias(const float* bias, int64_t rows, int64_t width, float* y, int64_t ldy);

/// Computes a block of a product with quantized weights, on the target in force. (gemm_quant.cc)
using GemmBlockFn = void (*)(const GemmArgs& args, const GemmBlock& block);
GemmBlockFn QuantGemmBlock();
/// Whether AVX-512's dot product of bytes may be used (it is, where the CPU has it); for tests.
void AllowVnni(bool allowed);

}  // namespace detour::kernels
