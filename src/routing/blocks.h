// Keys chosen by block (MoBA, arXiv 2502.13189): a query head sees its own block and the top_k − 1
// earlier blocks whose mean key has the highest product with it. No weights, no gradient through
// the choice: a model may switch between this and full attention. As in the paper, keys are
// averaged after RoPE and every query head chooses for itself; block_size counts the entries of the
// layer.
#pragma once

#include <memory>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

std::vector<Option> BlocksOptions();
void CheckBlocks(const RoutingConfig& config, std::vector<std::string>* faults);
std::vector<std::unique_ptr<Router>> MakeBlocks(const RoutingConfig& config, const Shape& shape,
                                                int32_t layer);

}  // namespace detour::routing
