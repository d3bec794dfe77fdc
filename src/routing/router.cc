#include "routing/router.h"

#include "core/rng.h"

namespace detour::routing {

std::vector<std::unique_ptr<Router>> OneRouter(std::unique_ptr<Router> router) {
  std::vector<std::unique_ptr<Router>> routers;
  routers.push_back(std::move(router));
  return routers;
}

std::vector<uint8_t> DrawFallbackRows(const DrawKey& key, int32_t layer, const Stream& stream,
                                      double share) {
  const Rng rng(key.seed, RngPurpose::kFallback, key.step, static_cast<uint32_t>(layer));
  std::vector<uint8_t> routed(stream.num_rows());
  for (size_t n = 0; n < routed.size(); ++n) {
    routed[n] = rng.Uniform(key.first_row + stream.SourceRow(static_cast<int64_t>(n))) < share;
  }
  return routed;
}

}  // namespace detour::routing
