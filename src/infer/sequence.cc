#include "infer/sequence.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace detour::infer {

at::Tensor Feed(const model::Model& model, const RaggedCache& cache, int32_t sequence,
                std::span<const int32_t> ids, int64_t first_position, int32_t num_layers,
                std::vector<routing::LayerPlans>* plans) {
  const auto stream = routing::Stream::FromSegments(
      {{sequence, 0, std::ssize(ids), static_cast<int32_t>(first_position)}});
  const at::Tensor ids_N = at::tensor(std::vector<int32_t>(ids.begin(), ids.end()), at::kInt);
  return Forward(model, ids_N, stream,
                 {.plans = plans, .caches = &cache.stores(), .num_layers = num_layers});
}

std::vector<uint8_t> AttendingRows(const routing::LayerPlans& plans, int64_t num_rows) {
  const routing::OuterPlan mixer = PlanOf(plans, routing::Site::kMixer);
  const routing::OuterPlan& outer =
      mixer.plan->decided() ? mixer : PlanOf(plans, routing::Site::kLayer);
  if (!outer.plan->decided()) return std::vector<uint8_t>(num_rows, 1);
  return OuterFlags(outer, num_rows);
}

void Attendance::Add(const model::ModelConfig& config, std::span<const int64_t> attended_by_layer,
                     int64_t num_tokens) {
  for (int32_t l = 0; l < config.num_layers; ++l) {
    if (!HasRouter(config, l, routing::Site::kLayer) &&
        !HasRouter(config, l, routing::Site::kMixer)) {
      continue;
    }
    attended += attended_by_layer[l];
    pairs += num_tokens;
  }
}

std::string AppendToken(int32_t token, const AnswerLimits& limits,
                        const std::function<bool(int32_t)>& on_token, std::vector<int32_t>* tokens,
                        std::vector<int32_t>* answer) {
  if (limits.max_tokens <= 0) return "length";
  if (std::ranges::count(limits.eos_ids, token) > 0) return "eos";
  tokens->push_back(token);
  answer->push_back(token);
  if (on_token && !on_token(token)) return "stopped";
  if (std::ssize(*answer) >= limits.max_tokens) return "length";
  return std::ssize(*tokens) >= limits.context ? "context" : "";
}

}  // namespace detour::infer
