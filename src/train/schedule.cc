#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace detour::train {

double LearningRate(const TrainConfig& c, int64_t step, int64_t total_steps) {
  if (step < c.warmup_steps) return c.lr * static_cast<double>(step + 1) / c.warmup_steps;
  if (c.lr_schedule == "wsd") {
    const double decay_steps = std::max(1.0, c.decay_ratio * total_steps);
    const double left = static_cast<double>(total_steps - step) / decay_steps;
    return c.min_lr + (c.lr - c.min_lr) * std::clamp(left, 0.0, 1.0);
  }
  const double span = std::max<int64_t>(total_steps - c.warmup_steps, 1);
  const double progress = std::min(1.0, static_cast<double>(step - c.warmup_steps) / span);
  return c.min_lr + (c.lr - c.min_lr) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
}

double TargetShare(const TrainConfig& c, int64_t step, int64_t total_steps) {
  const double ramp = c.share_ramp * total_steps;
  if (step >= ramp) return c.target_share;
  return 1 + (c.target_share - 1) * static_cast<double>(step) / ramp;
}

double ControllerRate(const TrainConfig& c, int64_t step, int64_t total_steps) {
  return std::max(c.controller_rate, LearningRate(c, step, total_steps) / c.lr);
}

}  // namespace detour::train
