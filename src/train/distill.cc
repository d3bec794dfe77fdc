#include "train/distill.h"

#include <ATen/ATen.h>

#include "core/error.h"

namespace detour::train {

Teacher::Teacher(const DistillOptions& options, const model::ModelConfig& student)
    : options_(options), model_(model::LoadModel(options.teacher)) {
  const model::ModelConfig& c = model_.config;
  if (c.vocab_size != student.vocab_size) {
    Fail("train.config", "--teacher {}: expected the model's vocabulary of {}, got {}",
         options.teacher, student.vocab_size, c.vocab_size);
  }
  if (wants_states() &&
      (c.hidden_size != student.hidden_size || c.num_layers != student.num_layers)) {
    Fail("train.config",
         "--distill-hidden: expected a teacher of {} layers of width {}, got {} layers of width {}",
         student.num_layers, student.hidden_size, c.num_layers, c.hidden_size);
  }
}

Teacher::Answer Teacher::Ask(const eval::Batch& batch) const {
  const at::NoGradGuard no_grad;
  Answer answer;
  answer.logits = {Forward(model_, batch.ids_N, batch.stream,
                           {.states = wants_states() ? &answer.states : nullptr}),
                   &model_.head, options_.weight, options_.temperature};
  return answer;
}

at::Tensor Teacher::HiddenLoss(const std::vector<at::Tensor>& states, const Answer& answer,
                               double share) const {
  at::Tensor sum = at::zeros({});
  for (size_t l = 0; l < states.size(); ++l) {
    const at::Tensor& t = answer.states[l];
    const at::Tensor distance = (states[l] - t).square().sum(1);
    sum = sum + (distance / t.square().sum(1).clamp_min(1e-12)).mean();
  }
  return sum * (options_.hidden * share / static_cast<double>(states.size()));
}

}  // namespace detour::train
