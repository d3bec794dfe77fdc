// One optimisation step: forward, loss, backward, clip, update, ratio controller.
#pragma once

#include <cstdint>
#include <vector>

#include "eval/batch.h"
#include "model/model.h"
#include "train/budget.h"
#include "train/distill.h"
#include "train/lora.h"
#include "train/optimizer.h"

namespace detour::train {

struct StepOptions {
  double lr = 0, grad_clip = 1.0;
  routing::Knobs knobs;
  /// Loss weights of the config's methods, in order; those left out: their aux_loss_coeff.
  std::vector<double> budget_weights;
  double target_share = 0, controller_rate = 0.1;  ///< target 0: the controller rests
  double controller_integral = 0;
  std::vector<double>* drifts = nullptr;  ///< of each router (routing::ControllerMove); null: 0
  bool activation_checkpointing = false;
  uint64_t seed = 0;
  int64_t step = 0;
  /// Weights of the losses after each layer, that of the last included; empty: only the last.
  std::vector<double> exit_weights;
  /// [micro-batch][layer]: rows to use instead of deciding; null: decide. With several
  /// micro-batches the statistics of budgets are then each one's own.
  const std::vector<std::vector<routing::LayerPlans>>* replay = nullptr;
  const Teacher* teacher = nullptr;  ///< whom to learn from beside the text
};

struct StepResult {
  double loss = 0;        ///< mean cross-entropy over the global batch
  double divergence = 0;  ///< mean KL(teacher ‖ model) over the same targets; 0 without one
  double aux_loss = 0;    ///< the budgets' values, before their weights
  double grad_norm = 0;   ///< before clipping
  BatchStatistics statistics;
};

/// Gradients of the mean cross-entropy over all micro-batches + λ · aux (METHODS §1) into the
/// weights' .grad. Statistics of routing (shares, "nothing routed") are those of the whole global
/// batch: with several micro-batches all decisions are taken first, in one forward pass
/// without gradients, and then replayed. If `differences` is not null it receives per router the
/// logit differences of all rows (experts: none). Does not update weights.
StepResult ComputeGradients(const model::Model& model,
                            const std::vector<eval::Batch>& micro_batches,
                            const StepOptions& options,
                            std::vector<std::vector<float>>* differences = nullptr);

/// ComputeGradients, then clip, AdamW and the controller; with `lora`, whose adapters the optimizer
/// has in place of their targets, those follow. Error("train.diverged") if loss or gradient norm is
/// not finite; the weights are then those before the step.
StepResult TrainStep(model::Model& model, AdamW& optimizer,
                     const std::vector<eval::Batch>& micro_batches, const StepOptions& options,
                     Lora* lora = nullptr);

/// Whether a router of the model has a bias that the controller can move.
bool HasShiftableRouter(const model::Model& model);

/// Sets every gate's bias so that exactly `target_share` of the rows of `batches` that reach it
/// take its span, one gate after the other and by the rule that serves (Mode::kInfer): the
/// controller's last move of a run, on more text than a step has and with weights that no longer
/// change. Costs two forward passes, and keeps a state of every row.
void SettleShares(model::Model& model, const std::vector<eval::Batch>& batches,
                  double target_share);

}  // namespace detour::train
