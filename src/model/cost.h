// What a model costs, by formula: operations, parameters, bytes of keys and values. The tests hold
// the formulas against the operations counted where they are executed.
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"

namespace detour::model {

int64_t ParameterCount(const ModelConfig& config);
int64_t RouterParameterCount(const ModelConfig& config);

/// Multiply-adds as 2 FLOP, over one sequence of T tokens. Router and head are included in the
/// totals.
struct Flops {
  double projections = 0;  ///< Q, K, V, O
  double scores = 0;       ///< QKᵀ and PV
  double mlp = 0;
  double router = 0;
  double head = 0;
  double Total() const { return projections + scores + mlp + router + head; }
};

/// How scores are counted: the keys a causal kernel visits, or the whole square of the attending
/// rows (as papers do).
enum class Counting { kCausal, kFull };

/// FLOPs of a forward pass over T tokens when each routed layer l routes routed_tokens[l] of them
/// (dense layers: ignored).
Flops ForwardFlops(const ModelConfig& config, int64_t num_tokens,
                   const std::vector<int64_t>& routed_tokens, Counting counting);
/// The same share in every routed layer.
Flops ForwardFlops(const ModelConfig& config, int64_t num_tokens, double share, Counting counting);

/// Σ_l entries_l · (2·G·K·4 bytes, + 4 bytes position on routed layers), for `num_tokens` cached
/// tokens; entries of a routed layer = share · tokens. Without page rounding.
double KvBytes(const ModelConfig& config, int64_t num_tokens, double share);

}  // namespace detour::model
