// AdamW over named weights: the update is libtorch's fused kernel, the state is ours, by name, so
// that it can be saved.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "model/model.h"

namespace detour::train {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
};

class AdamW {
 public:
  /// Makes every weight of the model a leaf that requires gradients. Matrices decay; norms and
  /// biases (1-D) do not.
  AdamW(model::Model& model, const AdamWOptions& options);

  void ZeroGrad();
  /// Scales all gradients so that their joint 2-norm is at most `max_norm` (0: no clipping);
  /// returns the norm before.
  double ClipGradNorm(double max_norm);
  /// One update. A weight without a gradient is left alone.
  void Step(double lr);

  /// first moment, second moment and step count of each weight: "NAME.exp_avg", "NAME.exp_avg_sq",
  /// "NAME.step".
  void ForEachState(const routing::TensorVisitor& visit);

 private:
  struct Param {
    std::string name;
    at::Tensor weight, exp_avg, exp_avg_sq, step;
  };
  AdamWOptions options_;
  std::vector<Param> params_;
};

}  // namespace detour::train
