// What a model costs, by formula: operations, parameters, bytes of keys and values. The tests hold
// the formulas against the operations counted where they are executed.
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "routing/plan.h"

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
/// rows (as papers do; windows and blocks have no square).
enum class Counting { kCausal, kFull };

/// Rows of one layer that do its work.
struct LayerRows {
  double entered = 0;   ///< that the layer let in
  double attended = 0;  ///< of those, that query
  double visited = 0;   ///< keys that these see, together
  double scored = 0;    ///< blocks of keys that these score to choose among them
  double fed = 0;       ///< rows that take the MLP; of all experts together, if it has any

  void Add(const LayerRows& other);
};
/// What the plans of a forward pass without a cache did.
std::vector<LayerRows> RowsOf(const ModelConfig& config, const routing::Stream& stream,
                              const std::vector<routing::LayerPlans>& plans);
/// Every gate lets the same share in (rounded), a router that has its own share that one; every
/// token goes to as many experts as it may.
std::vector<LayerRows> RowsAtShare(const ModelConfig& config, int64_t num_tokens, double share);

/// FLOPs of a serving forward pass over T tokens.
Flops ForwardFlops(const ModelConfig& config, int64_t num_tokens,
                   const std::vector<LayerRows>& rows, Counting counting);
Flops ForwardFlops(const ModelConfig& config, int64_t num_tokens, double share, Counting counting);

/// The dense config of the same width and heads whose causal FLOPs at T tokens are those of
/// `config` at `share`: of the numbers of layers the one that lets F stay nearest to its own, then
/// that F. The result is within 0.5 % or an Error("info.match").
ModelConfig MatchFlops(const ModelConfig& config, int64_t num_tokens, double share);

/// Σ_l entries_l · (2·G·K·4 bytes, + 4 bytes position where rows may be missing, + the sums of
/// blocks), for `num_tokens` cached tokens; a gate lets `share` of them in, and a window holds its
/// size beside. Without page rounding.
double KvBytes(const ModelConfig& config, int64_t num_tokens, double share);

}  // namespace detour::model
