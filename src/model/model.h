// Weights of a model as plain structs, one visitor over all of them, and the forward pass.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/exit.h"
#include "ops/linear.h"
#include "routing/plan.h"
#include "routing/router.h"

namespace detour::model {

/// What one layer stores of a token: the layout of its pages (with positions where rows may be
/// missing), and the window behind which entries leave that do not stay (size 0: all stay).
struct KvShape {
  kernels::KvLayout layout;
  ops::WindowRule window;
};
KvShape KvShapeOf(const ModelConfig& config, int32_t layer);

struct FfnWeights {
  ops::Matrix gate, up, down;  ///< [F, D], [F, D], [D, F]; without weights where there is none
};

struct LayerWeights {
  at::Tensor input_norm, post_norm;  ///< [D]
  ops::Matrix q, k, v, o;            ///< [H·K, D], [G·K, D], [G·K, D], [D, H·K]
  at::Tensor q_norm, k_norm;         ///< [K], of each head before rotation; undefined: none
  FfnWeights ffn;                    ///< the MLP; beside experts, the one that every row takes
  ops::Matrix shared_gate;           ///< [1, D], weighs that one beside experts; undefined: 1
  std::vector<FfnWeights> experts;   ///< empty: no experts
  std::array<std::unique_ptr<routing::Router>, 3> routers;  ///< by Site; null where nobody decides
  kernels::KvLayout kv_layout;
  int64_t sliding_window = 0;  ///< tokens that every row sees; 0: all before it
  bool rotates = true;         ///< queries and keys by their positions

  routing::Router* router(routing::Site site) const {
    return routers[static_cast<size_t>(site)].get();
  }
  bool routed() const { return routers[0] || routers[1] || routers[2]; }
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
/// layers in order. A tied head is not visited, and weights that layers share once. Load, save,
/// parameter groups and counting all go through here.
void ForEachTensor(Model& model, const routing::TensorVisitor& visit);
/// The weights of one layer's routers only; names relative to "model.layers.N.".
void ForEachRouterTensor(LayerWeights& layer, const routing::TensorVisitor& visit);

/// Weights allocated as zeros; those of the layers, the embedding and the head as shapes alone
/// (meta tensors) if they are to be filled (FillModel).
Model AllocateModel(const ModelConfig& config, bool shapes_only = false);
/// Matrices N(0, initializer_range), norms 1, biases 0; each tensor from (seed, its name): a routed
/// model and its dense twin share every weight they have in common.
void InitializeWeights(Model& model, uint64_t seed);
/// Values N(0, sigma²) from (seed, name) into t, f32 and contiguous.
void DrawNormal(uint64_t seed, const std::string& name, double sigma, at::Tensor& t);
int64_t CountParameters(Model& model, bool routers_only = false);

/// What becomes of a model's matrices when they are loaded.
struct WeightOptions {
  bool compact = false;  ///< packed only, to be served; else f32 tensors, to be trained
  kernels::WeightFormat format = kernels::WeightFormat::kF32;  ///< of packed ones
  bool as_stored = false;  ///< matrices that a GGUF file has in a packed format stay in it
};
/// A mapped file's weights by our names.
struct TensorSource {
  std::function<void(const std::string& name, at::Tensor& t)> read;
  /// The f32 values where they lie in the file; empty if it has others.
  std::function<std::span<const float>(const std::string& name)> view;
  /// Packs a matrix from quantized blocks that the file has; false if it has none. May be null.
  std::function<bool(const std::string& name, kernels::PackedMatrix* packed)> pack_stored;
};
/// Gives every tensor its values, one matrix after the other: a compact model never needs the
/// memory of its f32 tensors.
void FillModel(Model& model, const WeightOptions& options, const TensorSource& source);

/// Reads DIR/config.json and its safetensors (f32, bf16 or f16 → f32). Every tensor must be there
/// with its shape and no other.
Model LoadModel(const std::string& dir, const WeightOptions& options = {});
/// Bytes of all weights as they are kept.
int64_t WeightBytes(Model& model);
/// Rows of the embedding, [N, D].
at::Tensor EmbedTokens(const Model& model, const at::Tensor& ids_N);
/// Writes config.json and model.safetensors into `dir` (which exists).
void SaveModel(Model& model, const std::string& dir);

struct ForwardOptions {
  routing::Mode mode = routing::Mode::kInfer;
  routing::DrawKey draw;  ///< for everything random in training
  routing::Knobs knobs;
  const std::vector<routing::LayerPlans>* replay = nullptr;  ///< one per layer: use these rows
  std::vector<routing::LayerPlans>* plans = nullptr;         ///< receives one per layer
  const std::vector<ops::KvStore*>* caches = nullptr;        ///< one per layer
  bool checkpoint = false;                    ///< recompute layers in the backward pass
  ExitRule exit;                              ///< serving: rows may stop early
  int32_t num_layers = -1;                    ///< run only the first so many layers; -1: all
  std::vector<at::Tensor>* states = nullptr;  ///< receives x after each layer, before the last norm
  int32_t first_layer = 0;   ///< with input_ND: go on there, with the `plans` of the layers below
  at::Tensor input_ND = {};  ///< x before first_layer, inside no span; undefined: the embedding
};

/// Asks the router of a site. Rows of `taps` are the span's.
using DecideFn = std::function<routing::Plan(routing::Site, const routing::Taps& taps)>;

/// One layer: every span first asks for its plan, then does its work on the rows that take it.
/// (block.cc)
at::Tensor RunLayer(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                    const routing::Stream& stream, const DecideFn& decide, ops::KvStore* store,
                    routing::LayerPlans* plans);

/// Attention of a layer, added to x, for the rows that the plan names. `gated`: gates that decided
/// which keys there are, and whose gradient counts that. (mixer.cc)
at::Tensor Mixer(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                 const routing::Stream& stream, const routing::Plan& plan, ops::KvStore* store,
                 const ops::GatedKeys* gated = nullptr);
/// Heads of rows h projected by w (queries or keys), normalised where the model does that (norm
/// defined), and rotated to i32 positions. (mixer.cc)
at::Tensor RotatedHeads(const Model& model, const LayerWeights& layer, const at::Tensor& h,
                        const ops::Matrix& w, const at::Tensor& norm, const at::Tensor& positions,
                        const routing::Stream& stream);
/// W_O of the attention of all rows in a window and among those that stay; `swapped` as in
/// routing::WindowRowsOf. (mixer.cc)
at::Tensor WindowAttention(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                           const routing::Stream& stream, const routing::Plan& plan,
                           ops::KvStore* store, bool swapped);
/// x with f_RD, the answer for the plan's rows, added to those with their weights. (block.cc)
at::Tensor AddAnswer(const at::Tensor& x_ND, const routing::Plan& plan, const at::Tensor& f_RD);
/// The MLP, added to x, for the rows that the plan names. (block.cc)
at::Tensor Ffn(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
               const routing::Plan& plan);

/// The plan of one span of layer `l`. (stack.cc)
routing::Plan Decide(const Model& model, int32_t l, routing::Site site, const routing::Taps& taps,
                     const ForwardOptions& options);

/// Hidden states after the final norm, [N, D], for ids i32 [N]. (stack.cc)
at::Tensor Forward(const Model& model, const at::Tensor& ids_N, const routing::Stream& stream,
                   const ForwardOptions& options);

/// Logits [rows, V] of hidden states.
at::Tensor Logits(const Model& model, const at::Tensor& h_ND);

}  // namespace detour::model
