// A dense model as a GGUF file that llama.cpp and transformers read.
#pragma once

#include <string>

#include "io/gguf.h"
#include "model/model.h"

namespace detour::convert {

struct GgufOptions {
  io::GgufType type = io::GgufType::kF32;  ///< of matrices: F32, F16 or Q8_0
  bool tokenizer = true;                   ///< write the source's
};

/// Writes `path` whole or not at all (io::WriteGguf): the weights with Q and K in the file's order,
/// and what `source` (the path that the model was loaded from) has of tokenizer and chat templates.
/// Vectors stay F32; rows that are no whole Q8_0 blocks become F16.
/// Error("convert.gguf") for a routed model, and for what the format has no keys for here.
void WriteGgufModel(model::Model& model, const std::string& source, const std::string& path,
                    const GgufOptions& options);

}  // namespace detour::convert
