#include "train/step.h"

#include <ATen/ATen.h>

#include <cmath>
#include <functional>

#include "core/error.h"
#include "ops/loss.h"
#include "ops/rows.h"
#include "routing/controller.h"

namespace detour::train {

using eval::Batch;
using routing::Plan;

namespace {

routing::DrawKey KeyOf(const StepOptions& options, const Batch& batch) {
  return {options.seed, static_cast<uint32_t>(options.step), batch.first_row};
}

/// Gives the plans of one layer for all micro-batches, from their rows x[micro-batch].
using DecideFn = std::function<std::vector<Plan>(int32_t layer, const std::vector<at::Tensor>& x)>;

/// Runs all micro-batches forward, side by side, a layer at a time. Returns the plans taken,
/// [micro-batch][layer]. No gradients.
std::vector<std::vector<Plan>> WalkTogether(const model::Model& model,
                                            const std::vector<Batch>& batches,
                                            const DecideFn& decide) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> x(batches.size());
  std::vector<std::vector<Plan>> plans(batches.size());
  for (size_t m = 0; m < batches.size(); ++m) x[m] = ops::Embed(model.embed, batches[m].ids_N);
  for (int32_t l = 0; l < model.config.num_layers; ++l) {
    const model::LayerWeights& layer = model.layers[l];
    std::vector<Plan> taken = decide(l, x);
    for (size_t m = 0; m < batches.size(); ++m) {
      x[m] = Ffn(model, layer, Mixer(model, layer, x[m], batches[m].stream, taken[m], nullptr));
      plans[m].push_back(std::move(taken[m]));
    }
  }
  return plans;
}

std::vector<Plan> DecideEach(const model::Model& model, int32_t layer,
                             const std::vector<at::Tensor>& x, routing::Mode mode) {
  std::vector<Plan> plans;
  for (const at::Tensor& x_ND : x) plans.push_back(DecideLayer(model, layer, x_ND, {.mode = mode}));
  return plans;
}

/// The plans of all micro-batches, decided together so that "no row of the batch" means the global
/// one.
std::vector<std::vector<Plan>> DecideTogether(const model::Model& model,
                                              const std::vector<Batch>& batches,
                                              const StepOptions& options) {
  return WalkTogether(model, batches, [&](int32_t l, const std::vector<at::Tensor>& x) {
    std::vector<Plan> plans = DecideEach(model, l, x, routing::Mode::kTrain);
    int64_t num_routed = 0;
    for (size_t m = 0; m < x.size(); ++m) num_routed += plans[m].NumRouted(batches[m].stream);
    for (size_t m = 0; m < x.size() && num_routed == 0; ++m) {
      SetRows(DrawFallbackRows(KeyOf(options, batches[m]), l, x[m].size(0),
                               model.config.routing.fallback_share),
              &plans[m]);
    }
    return plans;
  });
}

/// Share of rows routed per layer, over all micro-batches.
std::vector<double> Shares(const model::Model& model, const std::vector<Batch>& batches,
                           const std::vector<std::vector<Plan>>& plans, int64_t num_rows) {
  std::vector<double> shares(model.layers.size(), 1.0);
  for (size_t l = 0; l < model.layers.size(); ++l) {
    if (!model.layers[l].router) continue;
    int64_t routed = 0;
    for (size_t m = 0; m < batches.size(); ++m) routed += plans[m][l].NumRouted(batches[m].stream);
    shares[l] = static_cast<double>(routed) / static_cast<double>(num_rows);
  }
  return shares;
}

/// Σ_l f_l / Σf · Σ_rows p_l / num_rows of one micro-batch; undefined without routers.
at::Tensor AuxLoss(const std::vector<Plan>& plans, const std::vector<double>& shares,
                   int64_t num_rows) {
  double sum_f = 0;
  for (size_t l = 0; l < plans.size(); ++l) {
    if (plans[l].budget_sum.defined()) sum_f += shares[l];
  }
  at::Tensor aux;
  for (size_t l = 0; l < plans.size(); ++l) {
    if (!plans[l].budget_sum.defined() || sum_f == 0) continue;
    const at::Tensor term = plans[l].budget_sum * (shares[l] / sum_f / num_rows);
    aux = aux.defined() ? aux + term : term;
  }
  return aux;
}

/// Logit differences ln(p0/p1) of a plan's rows, finite where a probability has underflowed.
void AppendDifferences(const Plan& plan, std::vector<float>* differences) {
  if (!plan.scores_N2.defined()) return;
  const float* p = ops::F32(plan.scores_N2);
  for (int64_t n = 0; n < plan.scores_N2.size(0); ++n) {
    differences->push_back(std::log(std::max(p[2 * n], 1e-30f)) -
                           std::log(std::max(p[2 * n + 1], 1e-30f)));
  }
}

}  // namespace

StepResult ComputeGradients(const model::Model& model, const std::vector<Batch>& batches,
                            const StepOptions& options,
                            std::vector<std::vector<float>>* differences) {
  int64_t num_rows = 0, num_targets = 0;
  for (const Batch& batch : batches) {
    num_rows += batch.stream.num_rows();
    num_targets += (batch.targets_N >= 0).sum().item<int64_t>();
  }
  const bool routed = !model.config.routing.layers.empty();
  const bool together = options.replay || (routed && batches.size() > 1);
  std::vector<std::vector<Plan>> plans(batches.size());
  StepResult result;
  if (together) {
    plans = options.replay ? *options.replay : DecideTogether(model, batches, options);
    result.share = Shares(model, batches, plans, num_rows);
  }
  for (size_t m = 0; m < batches.size(); ++m) {
    const Batch& batch = batches[m];
    std::vector<Plan> taken;
    const at::Tensor h = Forward(model, batch.ids_N, batch.stream,
                                 {.mode = routing::Mode::kTrain,
                                  .draw = KeyOf(options, batch),
                                  .fallback = true,
                                  .replay = together ? &plans[m] : nullptr,
                                  .plans = &taken,
                                  .checkpoint = options.activation_checkpointing});
    if (!together) result.share = Shares(model, batches, {taken}, num_rows);
    at::Tensor loss = ops::LinearCrossEntropy(h, model.head, batch.targets_N,
                                              1.0 / static_cast<double>(num_targets));
    result.loss += loss.item<double>();
    if (const at::Tensor aux = AuxLoss(taken, result.share, num_rows); aux.defined()) {
      result.aux_loss += aux.item<double>();
      if (model.config.routing.aux_loss_coeff > 0) {
        loss = loss + aux * model.config.routing.aux_loss_coeff;
      }
    }
    if (differences) {
      differences->resize(taken.size());
      for (size_t l = 0; l < taken.size(); ++l) AppendDifferences(taken[l], &(*differences)[l]);
    }
    loss.backward();
  }
  return result;
}

StepResult TrainStep(model::Model& model, AdamW& optimizer, const std::vector<Batch>& batches,
                     const StepOptions& options) {
  optimizer.ZeroGrad();
  std::vector<std::vector<float>> differences;
  const bool control = options.target_share > 0 && !model.config.routing.layers.empty();
  StepResult result = ComputeGradients(model, batches, options, control ? &differences : nullptr);
  result.grad_norm = optimizer.ClipGradNorm(options.grad_clip);
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
    Fail("train.diverged",
         "step {}: loss {}, gradient norm {}. Hint: lower --lr, or resume from the last checkpoint "
         "with another --seed",
         options.step, result.loss, result.grad_norm);
  }
  optimizer.Step(options.lr);
  if (control) {
    for (size_t l = 0; l < differences.size(); ++l) {
      if (!model.layers[l].router) continue;
      model.layers[l].router->ShiftBias(
          routing::ControllerShift(differences[l], options.target_share, options.controller_rate));
    }
  }
  return result;
}

void SettleShares(model::Model& model, const std::vector<Batch>& batches, double target_share) {
  WalkTogether(model, batches, [&](int32_t l, const std::vector<at::Tensor>& x) {
    std::vector<Plan> plans = DecideEach(model, l, x, routing::Mode::kInfer);
    if (!model.layers[l].router) return plans;
    std::vector<float> differences;
    for (const Plan& plan : plans) AppendDifferences(plan, &differences);
    model.layers[l].router->ShiftBias(routing::QuantileShift(differences, target_share));
    return DecideEach(model, l, x, routing::Mode::kInfer);
  });
}

}  // namespace detour::train
