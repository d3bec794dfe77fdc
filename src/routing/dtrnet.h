// DTRNet (arXiv 2509.00925; METHODS §1): a two-layer gate per routed layer; a token attends if its
// probability is above one half, else it takes the value path; either way is weighted with its
// probability, which carries the gradient.
#pragma once

#include <memory>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

std::vector<Option> DtrnetOptions();
std::vector<std::unique_ptr<Router>> MakeDtrnet(const RoutingConfig& config, const Shape& shape,
                                                int32_t layer);

}  // namespace detour::routing
