// What a tokenizer.json with a BPE model says.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/added_tokens.h"
#include "data/normalize.h"
#include "data/pretokenize.h"
#include "data/token_decoder.h"

namespace detour::data {

/// The step that GPT-2's ByteLevel pre-tokenizer without prefix space is, and its JSON.
std::vector<PretokenStep> Gpt2Pretokenize();
extern const char kGpt2ByteLevelJson[];

/// The content of a tokenizer.json with a BPE model. The defaults are GPT-2's pipeline.
struct BpeSpec {
  /// By id, as the file spells them; "" where the model has no token.
  std::vector<std::string> vocab;
  /// In order of rank. Both ids and what they merge into (MergedToken) are in `vocab`.
  std::vector<std::pair<int32_t, int32_t>> merges;
  /// The rank of each merge where that is not its place: of pairs of equal rank the leftmost in a
  /// word merges first. Empty, or one for each.
  std::vector<int32_t> merge_ranks;
  bool ignore_merges = false;  ///< a pre-token that is a token is not built by merges
  bool fuse_unk = false;
  bool byte_fallback = false;     ///< a character without a token becomes tokens "<0xNN>"
  std::optional<int32_t> unk_id;  ///< for characters without a token; without it they are dropped
  std::string continuing_subword_prefix, end_of_word_suffix;
  std::vector<AddedToken> added_tokens;

  std::vector<NormalizeStep> normalize;
  std::vector<PretokenStep> pretokenize = Gpt2Pretokenize();
  /// Pre-tokens are bytes, each one symbol, and the vocabulary spells them in ByteCharacters; else
  /// a symbol is a character and the vocabulary is text.
  bool byte_level = true;
  std::vector<DecodeStep> decode = {{.kind = DecodeStep::Kind::kByteLevel}};
  std::vector<int32_t> prefix_ids, suffix_ids;  ///< around one text, by the post-processor
  /// The components as JSON, for WriteTokenizerJson: they say what the six members above do.
  std::string normalizer_json = "null", pre_tokenizer_json = kGpt2ByteLevelJson;
  std::string post_processor_json = "null", decoder_json = kGpt2ByteLevelJson;

  /// Where the file itself names them (GGUF).
  std::optional<int32_t> bos_id, eos_id, pad_id;
};

/// What a merge of two tokens makes; nothing if `right` is shorter than the prefix that it loses.
std::optional<std::string> MergedToken(const BpeSpec& spec, const std::string& left,
                                       const std::string& right);

/// Reads the text of a tokenizer.json. Error("data.tokenizer" or "json") naming `name` and the
/// component that is malformed or unknown.
BpeSpec ParseTokenizerJson(std::string_view json, const std::string& name);

/// A tokenizer.json that `tokenizers` loads. Merges are in order of their ranks.
std::string WriteTokenizerJson(const BpeSpec& spec);

}  // namespace detour::data
