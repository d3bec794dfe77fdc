#include "infer/sequence.h"

#include <ATen/ATen.h>

namespace detour::infer {

at::Tensor Feed(const model::Model& model, const RaggedCache& cache, int32_t sequence,
                std::span<const int32_t> ids, int64_t first_position, int32_t num_layers) {
  const auto stream = routing::Stream::FromSegments(
      {{sequence, 0, std::ssize(ids), static_cast<int32_t>(first_position)}});
  const at::Tensor ids_N = at::tensor(std::vector<int32_t>(ids.begin(), ids.end()), at::kInt);
  return Forward(model, ids_N, stream, {.caches = &cache.stores(), .num_layers = num_layers});
}

std::string AppendToken(int32_t token, const AnswerLimits& limits,
                        const std::function<bool(int32_t)>& on_token, std::vector<int32_t>* tokens,
                        std::vector<int32_t>* answer) {
  if (limits.max_tokens <= 0) return "length";
  if (token == limits.eos_id) return "eos";
  tokens->push_back(token);
  answer->push_back(token);
  if (on_token && !on_token(token)) return "stopped";
  if (std::ssize(*answer) >= limits.max_tokens) return "length";
  return std::ssize(*tokens) >= limits.context ? "context" : "";
}

}  // namespace detour::infer
