// Sparse mixture of experts at the MLP (METHODS §4): Switch (arXiv 2101.03961) as top_k = 1 with
// the probability as weight, Mixtral's layout and names, loss or bias balancing (arXiv 2408.15664).
//
// Differences from the sources: weights start as the model's others do, not at Switch's smaller
// scale; capacity counts the tokens of the global batch and drops in row order, in training only:
// serving is dropless, so that a token's answer never depends on its batch-mates.
#pragma once

#include <memory>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

std::vector<Option> MoeOptions();
void CheckMoe(const RoutingConfig& config, std::vector<std::string>* faults);
std::vector<std::unique_ptr<Router>> MakeMoe(const RoutingConfig& config, const Shape& shape,
                                             int32_t layer);

}  // namespace detour::routing
