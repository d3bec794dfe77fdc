// Values that change over a run: pure functions of the step.
#pragma once

#include <cstdint>

#include "train/config.h"

namespace detour::train {

/// Learning rate of step `step` (0-based) of `total_steps`: linear warm-up from lr/warmup, then
/// cosine to min_lr, or (wsd) constant and over the last decay_ratio of the steps linear to min_lr.
double LearningRate(const TrainConfig& config, int64_t step, int64_t total_steps);

/// Target share of the ratio controller: 1 at the start, linear to target_share over the first
/// share_ramp of the steps.
double TargetShare(const TrainConfig& config, int64_t step, int64_t total_steps);

/// How much of the way to its batch's quantile the ratio controller goes in a step: as large as the
/// learning rate is of its peak, at least controller_rate. Routers that move fast are followed at
/// once; at the end the bias is a mean over the last 1/controller_rate batches.
double ControllerRate(const TrainConfig& config, int64_t step, int64_t total_steps);

}  // namespace detour::train
