// The tokenizer that a GGUF file describes in its metadata.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/bpe_spec.h"

namespace detour::data {

/// Values of `tokenizer.ggml.token_type`.
enum class GgufTokenType : int32_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

/// The keys `tokenizer.ggml.NAME` of a file, as they stand there; what is absent stays empty.
struct GgufTokenizer {
  std::string model;  ///< "gpt2" (byte-level BPE) or "llama" (SentencePiece's BPE)
  std::string pre;    ///< how text is cut, of "gpt2"; "" is "default"
  std::vector<std::string> tokens;
  std::vector<float> scores;        ///< of "llama": one for each token, higher merges first
  std::vector<int32_t> token_type;  ///< one for each token; none: all are normal
  std::vector<std::string> merges;  ///< of "gpt2": "left right", in order of rank
  std::optional<int64_t> bos_token_id, eos_token_id, unknown_token_id, padding_token_id;
  std::optional<bool> add_bos_token, add_eos_token, add_space_prefix;
};

/// The same as the content of a tokenizer.json: WriteTokenizerJson makes a file of it.
/// `pre`: default, gpt-2, llama-bpe, qwen2, smollm, tekken. Control and user-defined tokens are
/// found in the text; unused ones never come out. Error("data.tokenizer") naming `name` for
/// anything else and for what is malformed.
BpeSpec ReadGgufTokenizer(const GgufTokenizer& gguf, const std::string& name);

}  // namespace detour::data
