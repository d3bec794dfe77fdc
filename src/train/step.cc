#include "train/step.h"

#include <ATen/ATen.h>

#include <cmath>

#include "core/error.h"
#include "ops/loss.h"
#include "ops/rows.h"
#include "routing/controller.h"

namespace detour::train {

using eval::Batch;
using model::LayerWeights;
using routing::LayerPlans;
using routing::Mode;
using routing::Plan;

namespace {

/// All micro-batches as one.
Batch Join(const std::vector<Batch>& batches) {
  if (batches.size() == 1) return batches[0];
  std::vector<at::Tensor> ids;
  std::vector<routing::Segment> segments;
  int64_t rows = 0;
  int32_t sequences = 0;
  for (const Batch& b : batches) {
    ids.push_back(b.ids_N);
    for (routing::Segment s : b.stream.segments) {
      s.begin += rows;
      s.end += rows;
      s.sequence += sequences;
      segments.push_back(s);
    }
    rows += b.stream.num_rows();
    sequences = segments.back().sequence + 1;
  }
  return {
      at::cat(ids), {}, routing::Stream::FromSegments(std::move(segments)), batches[0].first_row};
}

/// What decisions of the whole batch are, and what they add up to.
struct Decided {
  std::vector<std::vector<LayerPlans>> plans;  // [micro-batch][layer]
  BatchStatistics statistics;
};

/// Decides for all micro-batches together, without gradients: "no row of the batch", capacities and
/// shares are those of the global batch.
Decided DecideTogether(const model::Model& model, const Budgets& budgets,
                       const std::vector<Batch>& batches, const StepOptions& options) {
  const at::NoGradGuard no_grad;
  const Batch joined = Join(batches);
  std::vector<LayerPlans> plans;
  Forward(model, joined.ids_N, joined.stream,
          {.mode = Mode::kTrain,
           .draw = {options.seed, static_cast<uint32_t>(options.step), joined.first_row},
           .knobs = options.knobs,
           .plans = &plans});
  Decided decided;
  budgets.Add({joined.stream, plans}, &decided.statistics);
  int64_t begin = 0;
  for (const Batch& b : batches) {
    std::vector<LayerPlans>& part = decided.plans.emplace_back();
    const int64_t end = begin + b.stream.num_rows();
    for (const LayerPlans& p : plans) part.push_back(SliceRows(p, begin, end));
    begin = end;
  }
  return decided;
}

/// Logit differences ln(p0/p1) of a gate's rows, finite where a probability has underflowed.
void AppendDifferences(const Plan& plan, std::vector<float>* differences) {
  const at::Tensor scores = plan.scores_NC.contiguous();
  const float* p = ops::F32(scores);
  for (int64_t n = 0; n < scores.size(0); ++n) {
    differences->push_back(std::log(std::max(p[2 * n], 1e-30f)) -
                           std::log(std::max(p[2 * n + 1], 1e-30f)));
  }
}

/// Loss weights of the config's methods: their aux_loss_coeff, unless the step says otherwise.
std::vector<double> BudgetWeights(const model::ModelConfig& config, const StepOptions& options) {
  std::vector<double> weights = options.budget_weights;
  for (size_t i = weights.size(); i < config.routing.size(); ++i) {
    weights.push_back(config.routing[i].NumberOr("aux_loss_coeff", 0));
  }
  return weights;
}

/// The loss of the last layer's answer: cross-entropy, or what a teacher makes of it.
at::Tensor TextLoss(const model::Model& model, const at::Tensor& h_ND,
                    const std::vector<at::Tensor>& states, const Batch& batch, int64_t num_targets,
                    const Teacher* teacher, StepResult* result) {
  const double scale = 1.0 / static_cast<double>(num_targets);
  if (!teacher) {
    const at::Tensor loss = ops::LinearCrossEntropy(h_ND, model.head, batch.targets_N, scale);
    result->loss += loss.item<double>();
    return loss;
  }
  const Teacher::Answer answer = teacher->Ask(batch);
  at::Tensor losses, divergence;
  at::Tensor loss = ops::LinearDistillation(h_ND, model.head, batch.targets_N, scale, answer.logits,
                                            &losses, &divergence);
  result->loss += losses.sum(at::kDouble).item<double>() * scale;
  result->divergence += divergence.sum(at::kDouble).item<double>() * scale;
  if (teacher->wants_states()) {
    const double share = static_cast<double>((batch.targets_N >= 0).sum().item<int64_t>()) * scale;
    loss = loss + teacher->HiddenLoss(states, answer, share);
  }
  return loss;
}

/// The weighted losses of the states after every layer; `last` is that of the last.
at::Tensor WithExits(const model::Model& model, const std::vector<double>& weights,
                     const std::vector<at::Tensor>& states, const Batch& batch,
                     const at::Tensor& last, int64_t num_targets) {
  at::Tensor loss = last * weights.back();
  for (size_t l = 0; l + 1 < states.size(); ++l) {
    if (weights[l] == 0) continue;
    const at::Tensor h = ops::RmsNorm(states[l], model.norm, model.config.rms_norm_eps);
    loss = loss + ops::LinearCrossEntropy(h, model.head, batch.targets_N,
                                          weights[l] / static_cast<double>(num_targets));
  }
  return loss;
}

}  // namespace

StepResult ComputeGradients(const model::Model& model, const std::vector<Batch>& batches,
                            const StepOptions& options,
                            std::vector<std::vector<float>>* differences) {
  int64_t num_targets = 0;
  for (const Batch& batch : batches) {
    num_targets += (batch.targets_N >= 0).sum().item<int64_t>();
  }
  const Budgets budgets(model.config);
  const std::vector<double> weights = BudgetWeights(model.config, options);
  const bool together = !options.replay && !budgets.routers().empty() && batches.size() > 1;
  const bool needs_states =
      !options.exit_weights.empty() || (options.teacher && options.teacher->wants_states());
  StepResult result;
  Decided decided;
  if (together) decided = DecideTogether(model, budgets, batches, options);
  const auto* replay = together ? &decided.plans : options.replay;
  BatchStatistics& statistics = together ? decided.statistics : result.statistics;
  for (size_t m = 0; m < batches.size(); ++m) {
    const Batch& batch = batches[m];
    std::vector<LayerPlans> taken;
    std::vector<at::Tensor> states;
    const at::Tensor h =
        Forward(model, batch.ids_N, batch.stream,
                {.mode = Mode::kTrain,
                 .draw = {options.seed, static_cast<uint32_t>(options.step), batch.first_row},
                 .knobs = options.knobs,
                 .replay = replay ? &(*replay)[m] : nullptr,
                 .plans = &taken,
                 .checkpoint = options.activation_checkpointing,
                 .states = needs_states ? &states : nullptr});
    if (!together) {
      statistics = {};
      budgets.Add({batch.stream, taken}, &statistics);
    }
    at::Tensor loss = TextLoss(model, h, states, batch, num_targets, options.teacher, &result);
    if (!options.exit_weights.empty())
      loss = WithExits(model, options.exit_weights, states, batch, loss, num_targets);
    const Budgets::Loss budget = budgets.Of({batch.stream, taken}, statistics, weights);
    result.aux_loss += budget.unweighted;
    if (budget.loss.defined()) loss = loss + budget.loss;
    if (differences) {
      differences->resize(budgets.routers().size());
      for (size_t r = 0; r < differences->size(); ++r) {
        const model::RouterId& id = budgets.routers()[r];
        const Plan& plan = *PlanOf(taken[id.layer], id.site).plan;
        const bool learns =
            plan.gate_N.defined() || plan.weight_N.defined() || plan.span_weight_N.defined();
        if (learns && plan.experts.empty()) AppendDifferences(plan, &(*differences)[r]);
      }
    }
    // A batch may reach nothing that is trained, such as routers that a schedule leaves out.
    if (loss.requires_grad()) loss.backward();
  }
  if (together) result.statistics = decided.statistics;
  return result;
}

StepResult TrainStep(model::Model& model, AdamW& optimizer, const std::vector<Batch>& batches,
                     const StepOptions& options, Lora* lora) {
  optimizer.ZeroGrad();
  std::vector<std::vector<float>> differences;
  const bool control = options.target_share > 0 && !model.config.routing.empty();
  StepResult result = ComputeGradients(model, batches, options, control ? &differences : nullptr);
  if (lora) lora->TakeGradients();
  result.grad_norm = optimizer.ClipGradNorm(options.grad_clip);
  if (!std::isfinite(result.loss) || !std::isfinite(result.grad_norm)) {
    Fail("train.diverged",
         "step {}: loss {}, gradient norm {}. Hint: lower --lr, or resume from the last checkpoint "
         "with another --seed",
         options.step, result.loss, result.grad_norm);
  }
  optimizer.Step(options.lr);
  if (lora) lora->Merge();
  const std::vector<model::RouterId> routers = model::Routers(model.config);
  for (size_t r = 0; r < routers.size(); ++r) {
    routing::Router& router = *model.layers[routers[r].layer].router(routers[r].site);
    if (control && !differences[r].empty()) {
      const double target = options.target_share * router.ServingShare(1);
      double none = 0, &drift = options.drifts ? options.drifts->at(r) : none;
      router.ShiftBias(routing::ControllerMove(differences[r], target, options.controller_rate,
                                               options.controller_integral, &drift));
    }
    router.Balance(result.statistics.routers[r].choices);
  }
  return result;
}

bool HasShiftableRouter(const model::Model& model) {
  for (const model::LayerWeights& layer : model.layers) {
    for (const auto& router : layer.routers) {
      if (router && router->ShiftBias(0)) return true;
    }
  }
  return false;
}

namespace {

/// A batch on its way up the layers: the state before `layer`, and the plans below.
struct Settling {
  const Batch* batch;
  std::vector<LayerPlans> plans;
  at::Tensor x_ND;  // undefined at the bottom
  int32_t layer = 0;

  /// Runs up to and with layer `top`, and stays below it unless that is inside a span.
  void Climb(const model::Model& model, int32_t top) {
    std::vector<at::Tensor> states;
    Forward(model, batch->ids_N, batch->stream,
            {.plans = &plans,
             .num_layers = top + 1,
             .states = &states,
             .first_layer = layer,
             .input_ND = x_ND});
    bool inside = top == layer;
    for (int32_t l = layer; l < top; ++l) {
      for (const routing::DeepSpan& s : plans[l].layer.deep) inside |= l + s.num_layers > top;
    }
    if (inside) return;
    x_ND = states[top - 1 - layer];
    layer = top;
  }
};

}  // namespace

void SettleShares(model::Model& model, const std::vector<Batch>& batches, double target_share) {
  const at::NoGradGuard no_grad;
  std::vector<Settling> climbing;
  for (const Batch& batch : batches) climbing.push_back({.batch = &batch});
  // In order: a router's bias changes what the later ones see.
  for (const model::RouterId& id : model::Routers(model.config)) {
    routing::Router& router = *model.layers[id.layer].router(id.site);
    if (router.num_experts() > 0 || !router.ShiftBias(0)) continue;
    std::vector<float> differences;
    for (Settling& s : climbing) {
      s.Climb(model, id.layer);
      AppendDifferences(*PlanOf(s.plans[id.layer], id.site).plan, &differences);
    }
    router.ShiftBias(routing::QuantileShift(differences, target_share * router.ServingShare(1)));
  }
}

}  // namespace detour::train
