// The language-model head and its loss in one operation.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/linear.h"

namespace detour::ops {

/// Sum over rows of weight · cross-entropy of softmax(h Wᵀ) against targets i32 [N] (target < 0:
/// the row does not count). The logits exist only in chunks of rows: with gradients enabled those
/// of h and W are formed in the forward pass and scaled in the backward, so that no chunk is
/// computed twice. Returns a scalar [] f32, the sum over rows in row order (double inside). `scale`
/// multiplies the loss (e.g. 1 / number of targets). If loss_N is not null it receives the unscaled
/// loss of each row.
at::Tensor LinearCrossEntropy(const at::Tensor& h_ND, const Matrix& head, const at::Tensor& targets,
                              double scale, at::Tensor* loss_N = nullptr);

}  // namespace detour::ops
