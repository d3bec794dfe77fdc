// One optimisation step: forward, loss, backward, clip, update, ratio controller.
#pragma once

#include <cstdint>
#include <vector>

#include "eval/batch.h"
#include "model/model.h"
#include "train/optimizer.h"

namespace detour::train {

struct StepOptions {
  double lr = 0, grad_clip = 1.0;
  double target_share = 0, controller_rate = 0.1;  ///< target 0: the controller rests
  bool activation_checkpointing = false;
  uint64_t seed = 0;
  int64_t step = 0;
  /// [micro-batch][layer]: rows to use instead of deciding; null: decide.
  const std::vector<std::vector<routing::Plan>>* replay = nullptr;
};

struct StepResult {
  double loss = 0;            ///< mean cross-entropy over the global batch
  double aux_loss = 0;        ///< Σ f_l mean(p_l) / Σ f_l, before λ
  double grad_norm = 0;       ///< before clipping
  std::vector<double> share;  ///< of rows that attend, one per layer (1 in dense layers)
};

/// Gradients of the mean cross-entropy over all micro-batches + λ · aux (METHODS §1) into the
/// weights' .grad. Statistics of routing (shares, "nothing routed") are those of the whole global
/// batch: with several micro-batches all decisions are taken first, layer by layer without
/// gradients, and then replayed. If `differences` is not null it receives per layer the logit
/// differences of all rows. Does not update weights.
StepResult ComputeGradients(const model::Model& model,
                            const std::vector<eval::Batch>& micro_batches,
                            const StepOptions& options,
                            std::vector<std::vector<float>>* differences = nullptr);

/// ComputeGradients, then clip, AdamW and the controller. Error("train.diverged") if loss or
/// gradient norm is not finite; the weights are then those before the step.
StepResult TrainStep(model::Model& model, AdamW& optimizer,
                     const std::vector<eval::Batch>& micro_batches, const StepOptions& options);

/// Sets every router's bias so that exactly `target_share` of the rows of `batches` attend, layer
/// by layer and by the rule that serves (Mode::kInfer): the controller's last move of a run, on
/// more text than a step has and with weights that no longer change. One forward pass; keeps one
/// layer's rows of all batches in memory.
void SettleShares(model::Model& model, const std::vector<eval::Batch>& batches,
                  double target_share);

}  // namespace detour::train
