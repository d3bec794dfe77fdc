// Confidence exit: rows whose state already decides stop there. Their keys and values in the layers
// above come from the state at the exit, so that later tokens find them (CALM's propagation).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "routing/plan.h"

namespace detour::model {

struct Model;

/// When a row exits after a layer. margin: the softmax of the head on the normed state has its two
/// largest probabilities at least `threshold` apart (2·V·D operations a row and layer, counted);
/// state: the cosine of the states before and after the layer is at least `threshold`.
struct ExitRule {
  enum class Kind { kNone, kMargin, kState };
  Kind kind = Kind::kNone;
  double threshold = 0.9;
  int32_t first_layer = 0;  ///< no exit before this one has run
};
/// Error("flag.exit") if the model has routers of its own that decide when serving.
void CheckExit(const Model& model, const ExitRule& rule);
/// "none", "margin", "state"; Error("flag.exit") otherwise.
ExitRule::Kind ParseExitKind(const std::string& name);

/// The rows still under way.
class ExitState {
 public:
  explicit ExitState(int64_t num_rows) : active_(num_rows, 1) {}
  /// Marks rows that exit after the layer that made x_ND of before_ND.
  void Update(const Model& model, const ExitRule& rule, int32_t layer, const at::Tensor& before_ND,
              const at::Tensor& x_ND);
  /// Rows that exited write keys and values and do nothing else.
  routing::LayerPlans Plans() const;

 private:
  std::vector<uint8_t> active_;
};

}  // namespace detour::model
