// Mixture-of-Depths (arXiv 2404.02258, no official code; METHODS §2): per document the k = ⌈C·T⌉
// tokens with the highest score r = w·x go through the layer, x += r · f(x) with f the layer's
// increment; the others pass it by.
//
// Top-k looks at later tokens. Only training uses it (and Mode::kTeacherForced, to measure the
// gap); everything that serves uses a causal rule, trained beside it with top-k membership as the
// label: `causal` = "bce": the router's own score, r + b > 0; "predictor": a small network on x
// without gradient into x; "none": there is no causal rule, and serving is refused.
#pragma once

#include <memory>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

std::vector<Option> ModOptions();
std::vector<std::unique_ptr<Router>> MakeMod(const RoutingConfig& config, const Shape& shape,
                                             int32_t layer);

/// Flags of the ⌈capacity · T⌉ rows with the highest scores of each document; ties: the earlier.
std::vector<uint8_t> TopRows(const Stream& stream, const float* scores, double capacity);

}  // namespace detour::routing
