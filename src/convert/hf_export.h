// A model as a directory that transformers loads.
#pragma once

#include <string>

#include "io/safetensors.h"
#include "model/model.h"

namespace detour::convert {

struct HfOptions {
  io::DType dtype = io::DType::kF32;  ///< of the weights: F32, F16 or BF16
  bool tokenizer = true;              ///< write the source's
};

/// Writes into `dir`, which exists: config.json and model.safetensors, and what `source` (the path
/// that the model was loaded from) has of tokenizer, chat templates and generation_config.json.
/// A model without routers is one of its own family. Others, and shapes that transformers' Llama
/// refuses, get model_type "detour" and the two Python files beside them (trust_remote_code).
/// Error("convert.hf") for a routed model that these files do not compute (biases, norms of heads,
/// windows of all rows, scaled rotary positions), and for values too large for F16.
/// Memory: for F16 and BF16 a copy of the weights in that type.
void WriteHfDirectory(model::Model& model, const std::string& source, const std::string& dir,
                      const HfOptions& options);

}  // namespace detour::convert
