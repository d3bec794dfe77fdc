// A model out of a GGUF file of the Llama family. Errors: Error("convert.gguf") for what the file
// says of a model, Error("io.gguf") for the file itself; one line with path, key or tensor,
// expected and found.
#pragma once

#include <string>

#include "io/gguf.h"
#include "model/model.h"

namespace detour::convert {

/// The shape that the metadata describe, with the names and defaults of Hugging Face. Every key of
/// the architecture is either read or refused; heads, widths and layers are checked against the
/// tensors when these are read.
model::ModelConfig ConfigFromGguf(const io::GgufFile& file);

/// The weights, Q and K in our order. Every tensor must be there with its shape and no
/// other. Memory: the model and a few megabytes.
model::Model ModelFromGguf(const io::GgufFile& file, const model::WeightOptions& options = {});

}  // namespace detour::convert
