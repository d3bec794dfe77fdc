// Losses on what routers do. Statistics are those of the global batch; each micro-batch contributes
// the part of the loss that its rows carry.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "model/model.h"

namespace detour::train {

/// What one router did with the global batch.
struct RouterStatistics {
  int64_t num_rows = 0;          ///< that reached it
  int64_t num_routed = 0;        ///< that took the span
  double sum_gate = 0;           ///< Σ gate over rows
  std::vector<int64_t> choices;  ///< rows that chose each expert, before capacity

  double ShareOfReached() const {
    return num_rows > 0 ? static_cast<double>(num_routed) / static_cast<double>(num_rows) : 0;
  }
};

struct BatchStatistics {
  int64_t num_rows = 0;
  std::vector<RouterStatistics> routers;  ///< as model::Routers
  /// FLOPs of the gated spans that were taken, and of all rows, by method of the config.
  std::vector<double> taken_flops, all_flops;
  std::vector<int64_t> counted_rows;  ///< rows that are not reserved, by method

  double Share(size_t router) const {
    return static_cast<double>(routers[router].num_routed) / static_cast<double>(num_rows);
  }
};

/// A forward pass over the rows of `stream`, and its plans.
struct Taken {
  const routing::Stream& stream;
  const std::vector<routing::LayerPlans>& plans;
};

/// Turns plans into budgets for one model.
class Budgets {
 public:
  explicit Budgets(const model::ModelConfig& config);

  const std::vector<model::RouterId>& routers() const { return routers_; }
  void Add(const Taken& taken, BatchStatistics* statistics) const;

  struct Loss {
    at::Tensor loss;        ///< of this micro-batch, weighted, with gradients; undefined: none
    double unweighted = 0;  ///< its part of the budgets' values, before their weights
  };
  /// METHODS §7, summed over the methods, each times its weight (`weights`, by method):
  /// mean_prob: Σ_l f_l mean(g_l) / Σ f_l. target_l1, target_l2: |mean g − target| over layers and
  /// tokens, its square. target_token_l1: mean over tokens of |mean over all layers − target|
  /// without the reserved first tokens. compute: FLOPs of the gated spans over those of all rows
  /// taken, Σ_t g_t (c_row + c_key Σ_{s≤t} g_s) in each document, where it is above the target or
  /// held by a dual variable. Experts: E Σ f_i P_i, f_i the share of all choices, summed over
  /// layers. And the plans' own penalties, summed over layers, mean over tokens.
  Loss Of(const Taken& taken, const BatchStatistics& statistics,
          const std::vector<double>& weights) const;

 private:
  struct Member {
    size_t router;
    double row_flops, key_flops;
  };
  at::Tensor Compute(const Member& member, const Taken& taken, bool all_rows) const;
  at::Tensor TokenBudget(size_t method, const Taken& taken) const;
  const routing::Plan& PlanOfRouter(const Taken& taken, size_t router) const;

  const model::ModelConfig& config_;
  std::vector<model::RouterId> routers_;
  std::vector<std::vector<Member>> members_;  // by method
};

}  // namespace detour::train
