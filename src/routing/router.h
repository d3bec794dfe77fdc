// The interface between a method and the rest of the engine: a router looks at rows and returns a
// plan.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "routing/options.h"
#include "routing/plan.h"

namespace detour::routing {

/// kTrain may decide by rules that look at other rows or draw random numbers; kTeacherForced is
/// kTrain's rule without randomness, to measure the gap; kInfer is the rule that serves: a row's
/// decision depends on that row alone.
enum class Mode : uint8_t { kTrain, kTeacherForced, kInfer };

/// What a random draw of a decision may depend on: never on the batch split or threads.
struct DrawKey {
  uint64_t seed = 0;
  uint32_t step = 0;
  int64_t first_row = 0;  ///< global index of row 0 of this call within the step's batch
};

/// What changes over a run by a schedule; a negative value means the method's own option.
struct Knobs {
  double temperature = -1;
  double capacity = -1;
  int32_t routed_layers = -1;  ///< only the deepest so many layers with routers use them
};

/// What a router may look at.
struct Taps {
  const at::Tensor& x_ND;  ///< the layer's input, not normalised
  const at::Tensor& h_ND;  ///< the span's normalised input; undefined for a layer
  const Stream& stream;
};

struct DecideArgs {
  Mode mode = Mode::kInfer;
  int32_t layer = 0;
  DrawKey draw;
  Knobs knobs;
  /// Take the rows of this plan, with fresh scores and gradients: activation checkpointing and
  /// accumulated batches never decide twice.
  const Plan* replay = nullptr;
  /// Plans of all layers, of which those below `layer` are made. Rows of their layer spans are the
  /// span's own at Site::kLayer. Null: there is nobody to follow.
  const std::vector<LayerPlans>* made = nullptr;
};

using TensorVisitor = std::function<void(const std::string& name, at::Tensor& tensor)>;

/// Decides for one span of one layer, and owns the weights it decides with. Not thread-safe.
class Router {
 public:
  explicit Router(Site site) : site_(site) {}
  virtual ~Router() = default;
  Site site() const { return site_; }

  virtual Plan Decide(const Taps& taps, const DecideArgs& args) const = 0;

  /// Calls `visit` for each weight; names are relative to "model.layers.N.".
  virtual void ForEachTensor(const TensorVisitor&) {}
  /// Sets the weights so that every row takes the span, `margin` the difference of its logits:
  /// where a model that was dense starts. False if nothing does that here.
  virtual bool Open(double /*margin*/) { return false; }
  /// Called once on a new model, after the weights were drawn: norms 1, biases 0, matrices normal.
  virtual void Initialize() {}

  /// Adds `delta` to the logit that decides for the span in Mode::kInfer (the ratio controller's
  /// handle). False if there is none.
  virtual bool ShiftBias(double) { return false; }
  /// After an optimizer step: rows of the global batch that chose each expert.
  virtual void Balance(const std::vector<int64_t>&) {}
  /// Token counts of the training text, for deciders that read a token's frequency.
  virtual void SetFrequencies(const std::vector<int64_t>&) {}

  /// The share of rows it is meant to let in when serving, in a model whose gates let in `share`.
  virtual double ServingShare(double share) const { return share; }
  /// Operations per row when serving, multiply-adds as 2 FLOP.
  virtual int64_t FlopsPerRow() const { return 0; }
  /// How rows choose their keys, if they do.
  virtual ops::BlockRule blocks() const { return {}; }
  /// Ways other than one MLP: experts of the ffn span, 0 if there are none.
  virtual int64_t num_experts() const { return 0; }

 private:
  Site site_;
};

/// What a method with one router a layer makes.
std::vector<std::unique_ptr<Router>> OneRouter(std::unique_ptr<Router> router);

/// The shape a router is made for.
struct Shape {
  int64_t dim = 0, vocab_size = 0;
  int32_t num_layers = 0;
  double rms_norm_eps = 1e-5;
  int64_t num_heads = 0;
};

/// Rows for a layer that routed none of the whole training batch: each with probability `share`, by
/// a hash of (seed, step, layer, global row). A draw of few rows may be empty.
std::vector<uint8_t> DrawFallbackRows(const DrawKey& key, int32_t layer, const Stream& stream,
                                      double share);

}  // namespace detour::routing
