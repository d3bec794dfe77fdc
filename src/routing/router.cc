#include "routing/router.h"

#include "core/rng.h"

namespace detour::routing {

std::vector<uint8_t> DrawFallbackRows(const DrawKey& key, int32_t layer, int64_t num_rows,
                                      double share) {
  const Rng rng(key.seed, RngPurpose::kFallback, key.step, static_cast<uint32_t>(layer));
  std::vector<uint8_t> routed(num_rows);
  for (int64_t n = 0; n < num_rows; ++n) {
    routed[n] = rng.Uniform(key.first_row + n) < share;
  }
  return routed;
}

}  // namespace detour::routing
