// The ratio controller (METHODS §6): holds the share of rows that attend at a target by moving a
// bias on the router's logit.
#pragma once

#include <span>
#include <vector>

namespace detour::routing {

/// How far to shift the logit of "attend", given the logit differences (attend − bypass) of all
/// rows of a step, so that the share of rows above 0 moves toward `target`: `rate` (0..1] times the
/// distance to the batch's own quantile, at most 1 a step. target >= 1 means all rows: the lowest
/// difference is moved to at least kAllMargin. Scale-free: a sign rule with a fixed step swings
/// between 0 and 1 while the logits are still smaller than the step. `differences` is reordered. 0
/// if it is empty.
double ControllerShift(std::vector<float>& differences, double target, double rate);

inline constexpr double kAllMargin = 0.5;

}  // namespace detour::routing
