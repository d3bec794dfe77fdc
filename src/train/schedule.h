// Values that change over a run: pure functions of the step.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "train/config.h"

namespace detour::train {

/// Learning rate of step `step` (0-based) of `total_steps`: linear warm-up from lr/warmup, then
/// cosine to min_lr, or (wsd) constant and over the last decay_ratio of the steps linear to min_lr.
double LearningRate(const TrainConfig& config, int64_t step, int64_t total_steps);

/// A value that goes from one number to another over a part of the run: "FROM->TO SHAPE
/// BEGIN..END", for instance "0->5 sine" or "1->0.125 cosine 0.1..0.4"; BEGIN and END are parts of
/// the run, 0..1 if left out. Shapes: constant (TO from BEGIN on), linear, cosine (slow at both
/// ends), sine (slow at the end).
struct Schedule {
  double from = 0, to = 0, begin = 0, end = 1;
  std::string shape;
  double At(int64_t step, int64_t total_steps) const;
};
/// What a schedule may move.
inline constexpr const char* kKnobs[] = {"target_share", "aux_loss_coeff", "temperature",
                                         "capacity", "routed_layers"};
/// "KNOB: SCHEDULE" of each text. Error("train.schedule") that names the fault.
using Schedules = std::map<std::string, Schedule>;
Schedules ParseSchedules(const std::vector<std::string>& texts);
/// The schedule of a knob, or `fallback` if it has none.
double ScheduledValue(const Schedules& schedules, const char* knob, double fallback, int64_t step,
                      int64_t total_steps);

/// Target share of the ratio controller: its schedule's; without one 1 at the start, linear to
/// target_share over the first share_ramp of the steps. 0: the controller rests, always.
double TargetShare(const TrainConfig& config, const Schedules& schedules, int64_t step,
                   int64_t total_steps);

/// How much of the way to its batch's quantile the ratio controller goes in a step: as large as the
/// learning rate is of its peak, at least controller_rate. Routers that move fast are followed at
/// once; at the end the bias is a mean over the last 1/controller_rate batches.
double ControllerRate(const TrainConfig& config, int64_t step, int64_t total_steps);

}  // namespace detour::train
