// The language-model head and its loss in one operation.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/linear.h"

namespace detour::ops {

/// What another model, the teacher, says of the same rows.
struct Teacher {
  at::Tensor h_ND;               ///< its hidden states after the last norm
  const Matrix* head = nullptr;  ///< [V, D of h_ND]
  double weight = 1;             ///< of the divergence; the cross-entropy keeps the rest
  double temperature = 1;
};

/// Sum over rows of weight · cross-entropy of softmax(h Wᵀ) against targets i32 [N] (target < 0:
/// the row does not count). The logits exist only in chunks of rows: with gradients enabled those
/// of h and W are formed in the forward pass and scaled in the backward, so that no chunk is
/// computed twice. Returns a scalar [] f32, the sum over rows in row order (double inside). `scale`
/// multiplies the loss (e.g. 1 / number of targets). If loss_N is not null it receives the unscaled
/// loss of each row.
at::Tensor LinearCrossEntropy(const at::Tensor& h_ND, const Matrix& head, const at::Tensor& targets,
                              double scale, at::Tensor* loss_N = nullptr);

/// The same with (1 − weight) · cross-entropy + weight · t² KL(teacher ‖ model), both of softmax
/// (logits / t), t the temperature (Hinton et al., arXiv 1503.02531), over the rows with a target.
/// Needs a second chunk of logits, the teacher's. `divergence_N` receives KL per row, without t²
/// and scale.
at::Tensor LinearDistillation(const at::Tensor& h_ND, const Matrix& head, const at::Tensor& targets,
                              double scale, const Teacher& teacher, at::Tensor* loss_N,
                              at::Tensor* divergence_N);

}  // namespace detour::ops
