#include "routing/skip.h"

#include "routing/gate.h"

namespace detour::routing {

std::vector<Option> SkipOptions() {
  std::vector<Option> options = GateOptions();
  SetDefault(&options, "scorer", "linear");
  SetDefault(&options, "estimator", "gumbel_ste");
  SetDefault(&options, "kv", "all");
  SetDefault(&options, "budget", "target_l1");
  SetDefault(&options, "aux_loss_coeff", 20.0);
  SetDefault(&options, "budget_target", 0.75);
  return options;
}

std::vector<std::unique_ptr<Router>> MakeSkip(const RoutingConfig& config, const Shape& shape,
                                              int32_t) {
  std::vector<std::unique_ptr<Router>> routers;
  routers.push_back(MakeGate(Site::kMixer, config, shape, "attn_router."));
  routers.push_back(MakeGate(Site::kFfn, config, shape, "mlp_router."));
  return routers;
}

}  // namespace detour::routing
