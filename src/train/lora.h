// Low-rank adapters (LoRA): a frozen matrix W of the model becomes W + s·B·A, and A and B are
// trained. The model's own matrix always holds that sum, so that training, validation, serving and
// checkpoints run the one forward pass there is.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"

namespace detour::train {

struct LoraOptions {
  int64_t rank = 8;
  double alpha = 16;              ///< s = alpha / rank
  std::string targets = "q,k,v";  ///< as ParseLoraTargets reads it
};

/// "q,v" -> {"q", "v"}: some of q, k, v, o, gate, up, down, each once; gate, up and down are those
/// of a layer's MLP, never of its experts. Empty if the text is anything else.
std::vector<std::string> ParseLoraTargets(const std::string& text);

/// The adapters of a model. Not thread-safe.
class Lora {
 public:
  /// For every target matrix [M, K] of the model: A [r, K] from N(0, 1/r²), drawn from (seed, its
  /// name), B [M, r] zero, so that the model is what it was, to the bit. The targets become leaves
  /// that require gradients and are frozen all the same: nobody steps them but Merge.
  /// Error("train.config") if the model has no matrix of a target.
  Lora(model::Model& model, const LoraOptions& options, uint64_t seed);

  /// After the backward passes of a step: dA = s·Bᵀ·G and dB = s·G·Aᵀ into the adapters' .grad,
  /// where G is the summed gradient of the target, which is dropped. Targets without one: nothing.
  void TakeGradients();
  /// Writes base + s·B·A into the targets, in place; bits do not depend on threads.
  void Merge();

  /// A and B of every target: "….q_proj.lora_A.weight", "….q_proj.lora_B.weight".
  void ForEachAdapter(const routing::TensorVisitor& visit);
  int64_t CountParameters();

  /// Writes adapters and bases ("….q_proj.base_layer.weight") to a safetensors file, the options
  /// beside. The base is stored because a run that goes on needs its bits, which W − s·B·A does not
  /// give back, and the model that the run started from may be gone by then.
  void Save(const std::string& path);
  /// Reads what Save wrote for the same options into adapters and bases. The model must have been
  /// read from the same checkpoint. Error("train.checkpoint") for another shape, or if its targets
  /// are not base + s·B·A.
  void Load(const std::string& path);

 private:
  struct Adapter {
    std::string name;   // of the target, without ".weight"
    at::Tensor weight;  // the model's
    at::Tensor base_MK, a_rK, b_Mr;
  };
  void ForEachTensor(const routing::TensorVisitor& visit);
  /// base + s·B·A of one target.
  void Sum(const Adapter& adapter, float* out_MK) const;

  LoraOptions options_;
  float scale_;
  std::vector<Adapter> adapters_;
};

}  // namespace detour::train
