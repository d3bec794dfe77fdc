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
/// final norm. `num_layers` >= 0: only the first so many layers run and take entries. `plans`
/// receives one per layer.
at::Tensor Feed(const model::Model& model, const RaggedCache& cache, int32_t sequence,
                std::span<const int32_t> ids, int64_t first_position, int32_t num_layers = -1,
                std::vector<routing::LayerPlans>* plans = nullptr);

/// Of each of N rows, whether it took part in a layer's attention (1): the layer let it in, and so
/// did its mixer.
std::vector<uint8_t> AttendingRows(const routing::LayerPlans& plans, int64_t num_rows);

/// (token, layer) pairs over the layers with a router of attention, and those that attended.
struct Attendance {
  int64_t pairs = 0, attended = 0;
  void Add(const model::ModelConfig& config, std::span<const int64_t> attended_by_layer,
           int64_t num_tokens);
  double Share() const { return static_cast<double>(attended) / static_cast<double>(pairs); }
};

/// When an answer ends.
struct AnswerLimits {
  int64_t max_tokens = 0;        ///< of the answer
  int64_t context = 0;           ///< tokens of prompt and answer
  std::vector<int32_t> eos_ids;  ///< each ends it
};

/// Appends a new token to `tokens` (prompt and answer) and `answer`, tells `on_token` (may be
/// empty). Why the answer ended: "length", "eos" (not appended), "stopped" (on_token said false),
/// "context"; or "".
std::string AppendToken(int32_t token, const AnswerLimits& limits,
                        const std::function<bool(int32_t)>& on_token, std::vector<int32_t>* tokens,
                        std::vector<int32_t>* answer);

}  // namespace detour::infer
