// Early exit as LayerSkip trains it (arXiv 2404.16710; METHODS §5): whole sequences skip layers at
// random, later layers more often, and the shared head is trained on the state after every layer.
// When serving, every row takes every layer unless ForwardOptions::exit says otherwise.
//
// Difference from the source: a dropped sequence writes no keys at that layer, as if the layer were
// not there for it; the original's per-sample dropout does the same.
#pragma once

#include <memory>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

std::vector<Option> EarlyExitOptions();
std::vector<std::unique_ptr<Router>> MakeEarlyExit(const RoutingConfig& config, const Shape& shape,
                                                   int32_t layer);

/// Weight of the loss of the state after each layer, ẽ(t, l): sums to 1. `step` of `total_steps`
/// decides which exits are on (curriculum); the last always is.
std::vector<double> ExitWeights(const RoutingConfig& config, int32_t num_layers, int64_t step,
                                int64_t total_steps);

}  // namespace detour::routing
