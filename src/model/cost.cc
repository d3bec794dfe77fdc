#include "model/cost.h"

#include <algorithm>
#include <cmath>

#include "routing/registry.h"

namespace detour::model {

namespace {

/// Cost of one router, from a router of this shape on no memory to speak of.
struct RouterCost {
  int64_t flops_per_row = 0, parameters = 0;
};

RouterCost CostOfRouter(const ModelConfig& c) {
  if (c.routing.layers.empty()) return {};
  const auto router = routing::FindMethod(c.routing.method)
                          .make(c.routing, c.hidden_size, c.routing.layers.front());
  return {router->FlopsPerRow(), router->NumParameters()};
}

bool IsRouted(const ModelConfig& c, int32_t l) {
  return std::binary_search(c.routing.layers.begin(), c.routing.layers.end(), l);
}

}  // namespace

int64_t RouterParameterCount(const ModelConfig& c) {
  return static_cast<int64_t>(c.routing.layers.size()) * CostOfRouter(c).parameters;
}

int64_t ParameterCount(const ModelConfig& c) {
  const int64_t d = c.hidden_size;
  const int64_t attention = 2 * d * (c.num_heads + c.num_kv_heads) * c.head_dim;
  const int64_t layer = attention + 3 * d * c.intermediate_size + 2 * d;
  const int64_t embeddings = (c.tie_word_embeddings ? 1 : 2) * c.vocab_size * d;
  return embeddings + c.num_layers * layer + d + RouterParameterCount(c);
}

Flops ForwardFlops(const ModelConfig& c, int64_t num_tokens,
                   const std::vector<int64_t>& routed_tokens, Counting counting) {
  const double d = c.hidden_size, n = num_tokens;
  const double q_width = c.num_heads * c.head_dim, kv_width = c.num_kv_heads * c.head_dim;
  const RouterCost router = CostOfRouter(c);
  Flops f;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    const bool routed = IsRouted(c, l);
    const double r = routed ? routed_tokens[l] : n;
    // V and O serve both branches; Q and K only rows that attend.
    f.projections += 2 * d * (n * (kv_width + q_width) + r * (q_width + kv_width));
    f.scores += 4 * q_width * (counting == Counting::kCausal ? r * (r + 1) / 2 : r * r);
    f.mlp += 6 * d * c.intermediate_size * n;
    if (routed) f.router += router.flops_per_row * n;
  }
  f.head = 2 * d * c.vocab_size * n;
  return f;
}

Flops ForwardFlops(const ModelConfig& c, int64_t num_tokens, double share, Counting counting) {
  return ForwardFlops(
      c, num_tokens,
      std::vector<int64_t>(c.num_layers, std::llround(share * static_cast<double>(num_tokens))),
      counting);
}

double KvBytes(const ModelConfig& c, int64_t num_tokens, double share) {
  const double entry = 2.0 * c.num_kv_heads * c.head_dim * 4;
  const double routed_layers = static_cast<double>(c.routing.layers.size());
  const double n = static_cast<double>(num_tokens);
  return n * ((c.num_layers - routed_layers) * entry + routed_layers * share * (entry + 4));
}

}  // namespace detour::model
