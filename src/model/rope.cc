#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace detour::model {

namespace {

/// Long waves are stretched by the factor, short ones not, those between partly.
void StretchLlama3(const RopeScaling& r, std::vector<float>* inverse) {
  const double length = static_cast<double>(r.original_max);
  for (float& f : *inverse) {
    const double wave = 2 * std::numbers::pi / f;
    if (wave > length / r.low_freq_factor) {
      f = static_cast<float>(f / r.factor);
    } else if (wave >= length / r.high_freq_factor) {
      const double smooth =
          (length / wave - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor);
      f = static_cast<float>((1 - smooth) * f / r.factor + smooth * f);
    }
  }
}

/// Dimensions that turn more than beta_fast times over the first training's length stay, those that
/// turn less than beta_slow times are stretched, a ramp between.
void StretchYarn(const RopeScaling& r, double theta, int64_t head_dim,
                 std::vector<float>* inverse) {
  const auto dim = static_cast<double>(head_dim);
  const auto dimension_of = [&](double turns) {
    return dim * std::log(static_cast<double>(r.original_max) / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(theta));
  };
  double low = dimension_of(r.beta_fast), high = dimension_of(r.beta_slow);
  if (r.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < inverse->size(); ++i) {
    const double stays = 1 - std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    const double f = (*inverse)[i];
    (*inverse)[i] = static_cast<float>(f / r.factor * (1 - stays) + f * stays);
  }
}

}  // namespace

RopeFrequencies FrequenciesOf(const ModelConfig& c) {
  RopeFrequencies rope;
  rope.inverse.resize(c.head_dim / 2);
  for (size_t i = 0; i < rope.inverse.size(); ++i) {
    const double exponent = static_cast<double>(2 * i) / static_cast<double>(c.head_dim);
    rope.inverse[i] = 1.0f / static_cast<float>(std::pow(c.rope_theta, exponent));
  }
  const RopeScaling& r = c.rope_scaling;
  if (r.type == "linear") {
    for (float& f : rope.inverse) f = static_cast<float>(f / r.factor);
  } else if (r.type == "llama3") {
    StretchLlama3(r, &rope.inverse);
  } else if (r.type == "yarn") {
    StretchYarn(r, c.rope_theta, c.head_dim, &rope.inverse);
    rope.scale = static_cast<float>(r.attention_factor);
  }
  return rope;
}

}  // namespace detour::model
