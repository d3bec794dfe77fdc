#include "routing/dtrnet.h"

#include "routing/gate.h"

namespace detour::routing {

std::vector<Option> DtrnetOptions() {
  std::vector<Option> options = GateOptions();
  SetDefault(&options, "bypass", "value");
  SetDefault(&options, "budget", "mean_prob");
  SetDefault(&options, "fallback_share", 0.15);
  return options;
}

std::vector<std::unique_ptr<Router>> MakeDtrnet(const RoutingConfig& config, const Shape& shape,
                                                int32_t) {
  return OneRouter(MakeGate(Site::kMixer, config, shape, "router."));
}

}  // namespace detour::routing
