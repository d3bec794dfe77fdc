// Row-wise operations: the forward is a kernel, the backward a kernel or a torch expression.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

namespace detour::ops {

/// x / rms(x) · w per row (kernels::RmsNorm). x_ND, w_D.
at::Tensor RmsNorm(const at::Tensor& x_ND, const at::Tensor& w_D, double eps);

/// silu(g) · u, elementwise. The gradients overwrite nothing.
at::Tensor SiluMul(const at::Tensor& g_NF, const at::Tensor& u_NF);
at::Tensor Silu(const at::Tensor& x);
at::Tensor Sigmoid(const at::Tensor& x);
/// Over each row: exp(x − max) by kernels::Exp, divided by their sum in ascending order.
at::Tensor Softmax(const at::Tensor& x_NC);

/// x + weight_N · f, one fused multiply-add per element; weight undefined means 1 (plain addition).
at::Tensor AddScaled(const at::Tensor& x_ND, const at::Tensor& f_ND, const at::Tensor& weight_N);

/// x[rows_R]; rows i32, ascending and distinct. Backward: scatter into zeros.
at::Tensor GatherRows(const at::Tensor& x_ND, const at::Tensor& rows_R);

/// x with row rows_R[r] replaced by y[r].
at::Tensor ReplaceRows(const at::Tensor& x_ND, const at::Tensor& rows_R, const at::Tensor& y_RD);

/// x with weight[r] · f[r] added to row rows[r], one after the other (a row may come several
/// times), one fused multiply-add per element.
at::Tensor AddToRows(const at::Tensor& x_ND, const at::Tensor& rows_R, const at::Tensor& f_RD,
                     const at::Tensor& weight_R);

/// The values of `hard`; the gradient goes to `soft`.
at::Tensor StraightThrough(const at::Tensor& hard_N, const at::Tensor& soft_N);

/// y itself; in the backward pass gate_N[n] receives dy[n] · difference[n]: the gradient of y[n] by
/// the weight of a way whose answer differs from the other's by difference[n] (a constant).
at::Tensor GateGradient(const at::Tensor& y_ND, const at::Tensor& difference_ND,
                        const at::Tensor& gate_N);

/// Rows of the embedding table for ids i32 [N]. Ids must be in range (CHECK).
at::Tensor Embed(const at::Tensor& table_VD, const at::Tensor& ids_N);

/// Rotary embedding of x [R, heads·K] at positions i32 [R]; the table is [max_position, 2, K/2]
/// (MakeRopeTable).
at::Tensor Rope(const at::Tensor& x, const at::Tensor& positions_R, const at::Tensor& cos_sin,
                int64_t head_dim);

/// cos and sin of position · inverse_frequency[i], times `scale`; the angle is formed in f32 as
/// transformers does, for positions 0..num_positions-1. [num_positions, 2, K/2].
at::Tensor MakeRopeTable(int64_t num_positions, std::span<const float> inverse_frequencies,
                         float scale = 1);

}  // namespace detour::ops
