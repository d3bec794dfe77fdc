#include "routing/dllm.h"

#include "routing/gate.h"

namespace detour::routing {

std::vector<Option> DllmOptions() {
  std::vector<Option> options = GateOptions();
  SetDefault(&options, "scorer", "norm_mlp");
  SetDefault(&options, "hidden", 512);
  SetDefault(&options, "estimator", "gumbel_ste");
  SetDefault(&options, "key_gradient", true);
  SetDefault(&options, "reserved", 2);
  SetDefault(&options, "budget", "target_token_l1");
  SetDefault(&options, "aux_loss_coeff", 5.0);
  SetDefault(&options, "budget_target", 0.5);
  return options;
}

std::vector<std::unique_ptr<Router>> MakeDllm(const RoutingConfig& config, const Shape& shape,
                                              int32_t) {
  return OneRouter(MakeGate(Site::kLayer, config, shape, "layer_router."));
}

}  // namespace detour::routing
