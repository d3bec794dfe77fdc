// A two-way gate: scores a row, and it takes the span or not. DTRNet, D-LLM and separate attention
// and MLP skipping are bundles of its options.
#pragma once

#include <memory>
#include <string>

#include "ops/linear.h"
#include "routing/router.h"

namespace detour::routing {

/// Options that every gate has, with the defaults of the plainest one (no bypass, prob_gate).
/// Estimators (METHODS §7): prob_gate: the way taken is weighted with its probability; ste: weight
/// 1, gradient as if it were the probability; gumbel_ste: the same with Gumbel noise and a
/// temperature in training; soft: both ways in training, weighted, hard when serving.
std::vector<Option> GateOptions();

/// What a gate's options cannot mean together; of one that governs a whole layer also.
void CheckGate(const RoutingConfig& config, std::vector<std::string>* faults);
void CheckLayerGate(const RoutingConfig& config, std::vector<std::string>* faults);

/// Scores rows: x -> logits of (take the span, do not).
class GateScorer {
 public:
  virtual ~GateScorer() = default;
  /// logit(take) − logit(leave), [N].
  virtual at::Tensor Difference(const at::Tensor& x_ND) const = 0;
  virtual void ForEachTensor(const TensorVisitor& visit) = 0;
  virtual void Initialize() {}
  virtual void ShiftBias(double delta) = 0;
  /// Sets the last layer so that the difference is `margin` for every row, or near it.
  virtual void Open(double margin) = 0;
  virtual int64_t FlopsPerRow() const = 0;
};

/// "mlp" (DTRNet: D -> hidden -> 2, hidden 0: D/2), "linear" (D -> 2), "norm_mlp" (D-LLM: D ->
/// hidden -> RMSNorm -> SiLU -> 2, final bias (0.1, 2.0), column 1 takes the span). Tensors are
/// named prefix + "weight_predictor.…".
std::unique_ptr<GateScorer> MakeScorer(const std::string& kind, const Shape& shape, int64_t hidden,
                                       const std::string& prefix);

/// A gate by its config's options; tensors are named with `prefix` ("router.").
std::unique_ptr<Router> MakeGate(Site site, const RoutingConfig& config, const Shape& shape,
                                 const std::string& prefix);

}  // namespace detour::routing
