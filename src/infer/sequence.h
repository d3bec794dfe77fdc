// One sequence through a cache, and the end of an answer: what every way to decode shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "infer/ragged_cache.h"
#include "model/model.h"

namespace detour::infer {

/// Feeds `ids` (at least one), which stand at positions first_position, first_position + 1, … of a
/// sequence whose earlier tokens the cache has; their entries join it. States [N, D] after the
/// final norm. `num_layers` >= 0: only the first so many layers run and take entries.
at::Tensor Feed(const model::Model& model, const RaggedCache& cache, int32_t sequence,
                std::span<const int32_t> ids, int64_t first_position, int32_t num_layers = -1);

/// When an answer ends.
struct AnswerLimits {
  int64_t max_tokens = 0;  ///< of the answer
  int64_t context = 0;     ///< tokens of prompt and answer
  int32_t eos_id = -1;     ///< -1: none
};

/// Appends a new token to `tokens` (prompt and answer) and `answer`, tells `on_token` (may be
/// empty). Why the answer ended: "length", "eos" (not appended), "stopped" (on_token said false),
/// "context"; or "".
std::string AppendToken(int32_t token, const AnswerLimits& limits,
                        const std::function<bool(int32_t)>& on_token, std::vector<int32_t>* tokens,
                        std::vector<int32_t>* answer);

}  // namespace detour::infer
