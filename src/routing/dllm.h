// D-LLM (NeurIPS 2024; METHODS §3): a gate per layer from the third on decides whether a token
// takes the layer; hard Gumbel-softmax in training, argmax when serving; a token that skips writes
// no key there, and that eviction carries gradient; the first two tokens of a document always
// execute; the budget holds each token's share of layers at a target.
//
// Differences from the original code: no 1e-6 in the normaliser of training alone, an executed
// query always keeps its own key, and the bytes of evicted keys are really freed.
#pragma once

#include <memory>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

std::vector<Option> DllmOptions();
std::vector<std::unique_ptr<Router>> MakeDllm(const RoutingConfig& config, const Shape& shape,
                                              int32_t layer);

}  // namespace detour::routing
