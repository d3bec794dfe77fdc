// AdamW over named weights: the update is libtorch's fused kernel, the state is ours, by name, so
// that it can be saved.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "model/model.h"

namespace detour::train {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
};

class AdamW {
 public:
  /// Calls a visitor for every weight that is to be trained.
  using ForEachTrained = std::function<void(const routing::TensorVisitor& visit)>;

  /// Makes every trained weight a leaf that requires gradients; the others stay as they are.
  /// Matrices decay; norms and biases (1-D) do not.
  AdamW(const ForEachTrained& for_each, const AdamWOptions& options);
  /// The same for all weights of the model.
  AdamW(model::Model& model, const AdamWOptions& options);

  int64_t CountParameters() const;

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
