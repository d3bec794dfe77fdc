// The interface between a method and the rest of the engine: a router looks at rows and returns a
// plan.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "routing/plan.h"

namespace detour::routing {

/// The `routing` object of config.json.
struct RoutingConfig {
  std::string method = "dense";
  std::vector<int32_t> layers;   ///< routed layers, ascending
  double aux_loss_coeff = 0;     ///< λ of the mean-probability budget
  double fallback_share = 0.15;  ///< share of rows routed where a training step's layer chose none
};

enum class Mode { kTrain, kInfer };

/// What a random draw of a decision may depend on: never on the batch split or threads.
struct DrawKey {
  uint64_t seed = 0;
  uint32_t step = 0;
  int64_t first_row = 0;  ///< global index of row 0 of this call within the step's batch
};

using TensorVisitor = std::function<void(const std::string& name, at::Tensor& tensor)>;

/// Decides for one layer, and owns the weights it decides with. Not thread-safe.
class Router {
 public:
  virtual ~Router() = default;

  /// The plan for rows x [N,D] of the layer's input. A row's decision depends on that row alone in
  /// every mode that serves. With `replay` the rows are taken from it (same rows, fresh scores with
  /// gradients): activation checkpointing and accumulated batches never decide twice.
  virtual Plan Decide(const at::Tensor& x_ND, Mode mode, const Plan* replay) const = 0;

  /// Calls `visit` for each weight; names are relative to "model.layers.N.".
  virtual void ForEachTensor(const TensorVisitor& visit) = 0;

  /// Adds `delta` to the logit that decides for attention (the ratio controller's handle).
  virtual void ShiftBias(double delta) = 0;

  /// Operations per row, multiply-adds as 2 FLOP; and the number of parameters.
  virtual int64_t FlopsPerRow() const = 0;
  virtual int64_t NumParameters() const = 0;
};

/// Rows for a layer that routed none of the whole training batch: row r with probability `share`,
/// by a hash of (seed, step, layer, global row). A draw of few rows may be empty.
std::vector<uint8_t> DrawFallbackRows(const DrawKey& key, int32_t layer, int64_t num_rows,
                                      double share);

}  // namespace detour::routing
