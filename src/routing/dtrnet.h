// DTRNet (arXiv 2509.00925; METHODS §1): per token and layer, R(x) = W2 SiLU(W1 x + b1) + b2 on the
// un-normalised layer input, p = softmax(R), the token attends iff p0 > 0.5. The branch taken is
// weighted by its probability, which carries the router's gradient. As in the public code; its
// defects (padding routed, sequences mixed, wrong cached decode) are not.
#pragma once

#include "routing/router.h"

namespace detour::routing {

/// Weights: router.weight_predictor.{0,2}.{weight,bias}, hidden width dim/2.
std::unique_ptr<Router> MakeDtrnetRouter(const RoutingConfig& config, int64_t dim, int32_t layer);

}  // namespace detour::routing
