// Weights of a model as plain structs, one visitor over all of them, and the forward pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/config.h"
#include "ops/linear.h"
#include "routing/plan.h"
#include "routing/router.h"

namespace detour::model {

struct LayerWeights {
  at::Tensor input_norm, post_norm;         ///< [D]
  ops::Matrix q, k, v, o;                   ///< [H·K, D], [G·K, D], [G·K, D], [D, H·K]
  ops::Matrix gate, up, down;               ///< [F, D], [F, D], [D, F]
  std::unique_ptr<routing::Router> router;  ///< null in dense layers
};

struct Model {
  ModelConfig config;
  at::Tensor embed;  ///< [V, D]
  std::vector<LayerWeights> layers;
  at::Tensor norm;   ///< [D]
  ops::Matrix head;  ///< [V, D]; the embedding itself if tied

  /// Rotary table that covers the stream's positions; grows as needed.
  const at::Tensor& RopeTable(const routing::Stream& stream) const;

 private:
  mutable at::Tensor rope_table_;
};

/// Visits every weight by its Hugging Face name (routers by the DTRNet code's), embedding first,
/// layers in order. A tied head is not visited. Load, save, parameter groups and counting all go
/// through here.
void ForEachTensor(Model& model, const routing::TensorVisitor& visit);

/// Weights allocated as zeros.
Model AllocateModel(const ModelConfig& config);
/// Matrices N(0, initializer_range), norms 1, biases 0; each tensor from (seed, its name): a DTRNet
/// and its dense twin share every weight they have in common.
void InitializeWeights(Model& model, uint64_t seed);
int64_t CountParameters(Model& model, bool routers_only = false);

/// Reads DIR/config.json and its safetensors (f32, bf16 or f16 → f32). Every tensor must be there
/// with its shape and no other.
Model LoadModel(const std::string& dir);
/// Writes config.json and model.safetensors into `dir` (which exists).
void SaveModel(Model& model, const std::string& dir);

struct ForwardOptions {
  routing::Mode mode = routing::Mode::kInfer;
  routing::DrawKey draw;  ///< for the training fallback
  bool fallback = false;  ///< a layer that routes no row of this call draws rows
  const std::vector<routing::Plan>* replay = nullptr;  ///< one per layer: use these rows
  std::vector<routing::Plan>* plans = nullptr;         ///< receives one per layer
  const std::vector<ops::KvStore*>* caches = nullptr;  ///< one per layer
  bool checkpoint = false;                             ///< recompute layers in the backward pass
};

/// One layer: attend or bypass, then the MLP. (block.cc)
at::Tensor Mixer(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                 const routing::Stream& stream, const routing::Plan& plan, ops::KvStore* store);
at::Tensor Ffn(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND);

/// The plan of layer `l` for its input. (stack.cc)
routing::Plan DecideLayer(const Model& model, int32_t l, const at::Tensor& x_ND,
                          const ForwardOptions& options);

/// Hidden states after the final norm, [N, D], for ids i32 [N]. (stack.cc)
at::Tensor Forward(const Model& model, const at::Tensor& ids_N, const routing::Stream& stream,
                   const ForwardOptions& options);

/// Logits [rows, V] of hidden states.
at::Tensor Logits(const Model& model, const at::Tensor& h_ND);

}  // namespace detour::model
