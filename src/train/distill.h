// Distillation: a run's model learns what another model, the teacher, says of the same text.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "eval/batch.h"
#include "model/model.h"
#include "ops/loss.h"

namespace detour::train {

struct DistillOptions {
  std::string teacher;     ///< model directory; empty: no distillation
  double weight = 1;       ///< of the divergence of the logits; the cross-entropy keeps the rest
  double temperature = 1;  ///< of both softmaxes
  double hidden = 0;       ///< weight of the distance of the states after each layer
  bool operator==(const DistillOptions&) const = default;
};

/// A frozen model that serves. Not thread-safe.
class Teacher {
 public:
  /// Error("train.config") unless the model at options.teacher has the student's vocabulary and,
  /// with `hidden`, its width and layers.
  Teacher(const DistillOptions& options, const model::ModelConfig& student);

  struct Answer {
    ops::Teacher logits;
    std::vector<at::Tensor> states;  ///< x after each layer; empty without `hidden`
  };
  Answer Ask(const eval::Batch& batch) const;

  /// The distance of states, weighted: the mean over rows and layers of ‖s − t‖² / ‖t‖², t the
  /// teacher's, times `hidden` and `share`, this batch's part of the global one.
  at::Tensor HiddenLoss(const std::vector<at::Tensor>& states, const Answer& answer,
                        double share) const;

  const model::Model& model() const { return model_; }
  bool wants_states() const { return options_.hidden > 0; }

 private:
  DistillOptions options_;
  model::Model model_;
};

}  // namespace detour::train
