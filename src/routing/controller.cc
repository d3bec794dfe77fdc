#include "routing/controller.h"

#include <algorithm>
#include <cmath>

namespace detour::routing {

double QuantileShift(std::vector<float>& differences, double target) {
  if (differences.empty()) return 0;
  const auto n = static_cast<int64_t>(differences.size());
  if (target >= 1) {
    const float lowest = *std::min_element(differences.begin(), differences.end());
    return std::max(kAllMargin - lowest, 0.0);
  }
  // Exactly `above` rows lie above the midpoint of two neighbours in order.
  const int64_t above = std::clamp<int64_t>(std::llround(target * n), 0, n);
  double threshold;
  if (above == 0 || above == n) {
    const auto [low, high] = std::minmax_element(differences.begin(), differences.end());
    threshold = above == 0 ? *high : *low - 1e-3;
  } else {
    const auto cut = differences.begin() + (n - above);
    std::nth_element(differences.begin(), cut, differences.end());
    threshold = 0.5 * (*cut + *std::max_element(differences.begin(), cut));
  }
  return -threshold;
}

double ControllerShift(std::vector<float>& differences, double target, double rate) {
  return rate * std::clamp(QuantileShift(differences, target), -1.0, 1.0);
}

double ControllerMove(std::vector<float>& differences, double target, double rate, double integral,
                      double* drift) {
  const double shift = ControllerShift(differences, target, rate);
  // A way that was cut is a way to go, not a drift.
  if (std::abs(shift) < rate) *drift = std::clamp(*drift + integral * shift, -1.0, 1.0);
  if (target >= 1) *drift = 0;
  return shift + *drift;
}

}  // namespace detour::routing
