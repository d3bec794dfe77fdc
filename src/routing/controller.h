// The ratio controller (METHODS §6): holds the share of rows that attend at a target by moving a
// bias on the router's logit.
#pragma once

#include <span>
#include <vector>

namespace detour::routing {

/// How far to shift the logit of "attend", given the logit differences (attend − bypass) of rows,
/// so that a share `target` of these rows lies above 0. target >= 1 means all rows: the lowest
/// difference is moved to at least kAllMargin. `differences` is reordered. 0 if it is empty.
double QuantileShift(std::vector<float>& differences, double target);

/// The controller's shift after a training step: `rate` (0..1] of the way to the quantile of the
/// step's rows, at most 1 a step. Scale-free: a sign rule with a fixed step swings between 0 and 1
/// while the logits are still smaller than the step.
double ControllerShift(std::vector<float>& differences, double target, double rate);

/// The same and `drift`, what the controller adds in every step beside: to it goes `integral` of
/// each shift that was not cut, so that it comes to take up what training adds in every step. It
/// stays within [-1, 1], and is 0 with target 1, where there is only one side to move to.
double ControllerMove(std::vector<float>& differences, double target, double rate, double integral,
                      double* drift);

inline constexpr double kAllMargin = 0.5;

}  // namespace detour::routing
