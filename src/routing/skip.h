// Attention and MLP skipped separately (SkipGPT; METHODS §5): two gates a layer, both reading the
// layer's input, hard Gumbel-softmax, a budget on the mean over layers of both. `kv` says whether
// tokens that skip attention stay visible as keys: "all" (the original) or "executed".
//
// Difference from the source: nothing is frozen; the original trains routers on a frozen model,
// then LoRA.
#pragma once

#include <memory>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

std::vector<Option> SkipOptions();
std::vector<std::unique_ptr<Router>> MakeSkip(const RoutingConfig& config, const Shape& shape,
                                              int32_t layer);

}  // namespace detour::routing
