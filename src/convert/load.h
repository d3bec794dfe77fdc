// A user's model by its path: a Hugging Face directory or a GGUF file. What every command uses.
#pragma once

#include <memory>
#include <string>

#include "data/chat_template.h"
#include "data/tokenizer.h"
#include "model/model.h"

namespace detour::convert {

/// Whether `path` is a regular file that begins as GGUF files do.
bool IsGguf(const std::string& path);

/// A directory, a config.json or a GGUF file.
model::ModelConfig LoadConfig(const std::string& path);
/// A directory or a GGUF file. Errors: model::LoadModel's, or gguf_import.h's.
model::Model LoadModel(const std::string& path, const model::WeightOptions& options = {});
/// A directory with a tokenizer, a tokenizer's file, or a GGUF file.
std::unique_ptr<data::Tokenizer> LoadTokenizer(const std::string& path);
/// The chat template of a directory or a GGUF file; ChatML where there is none.
data::ChatTemplate LoadChatTemplate(const std::string& path);

/// Writes into `dir`, which exists, what transformers and LoadTokenizer read of the tokenizer and
/// the chat templates at `path` (a directory, a tokenizer's file or a GGUF file). False if a
/// directory has none; a GGUF file without one is an Error.
bool WriteTokenizerFiles(const std::string& path, const std::string& dir);

}  // namespace detour::convert
