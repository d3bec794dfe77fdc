// Rotary frequencies of a model, stretched as its config says.
#pragma once

#include <vector>

#include "model/config.h"

namespace detour::model {

struct RopeFrequencies {
  std::vector<float> inverse;  ///< [K/2], radians a position
  float scale = 1;             ///< of cosine and sine
};

/// The frequencies that transformers computes for rope_type default, linear, llama3 and yarn
/// (modeling_rope_utils). "dynamic" changes them with the length of a text only beyond
/// max_position_embeddings, where this engine does not go: up to there it is the default.
RopeFrequencies FrequenciesOf(const ModelConfig& config);

}  // namespace detour::model
