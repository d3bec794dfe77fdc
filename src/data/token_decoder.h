// Makes text of tokens as the `decoder` of a tokenizer.json says.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "data/normalize.h"

namespace detour::data {

/// The bytes that `token` stands for in GPT-2's alphabet, or nothing if it has a character outside
/// it.
std::optional<std::string> BytesOfToken(std::string_view token);

/// The byte that a token "<0xNN>" stands for.
std::optional<char> ByteOfToken(std::string_view token);

struct DecodeStep {
  enum class Kind { kByteLevel, kByteFallback, kFuse, kReplace, kStrip, kMetaspace, kSuffix };
  Kind kind = Kind::kByteLevel;
  std::string pattern;  ///< kReplace; see Replacer
  bool is_regex = false;
  /// kReplace: the new text; kStrip, kMetaspace: the character; kSuffix: the end of a word
  std::string content;
  int64_t start = 0, stop = 0;  ///< kStrip: at most so many at either end
  bool drop_first = false;      ///< kMetaspace: the first token loses its marks
};

/// A chain of steps over a list of tokens, whose results are then joined. Bytes stay as they are:
/// where they are not UTF-8, `tokenizers` puts U+FFFD. Immutable.
class TokenDecoder {
 public:
  /// Error("data.tokenizer") for a pattern that does not compile.
  explicit TokenDecoder(const std::vector<DecodeStep>& steps);

  /// Whether the chain is GPT-2's ByteLevel alone: a token's bytes are BytesOfToken.
  bool IsByteLevel() const;
  /// Whether Decode is Finish of what Token gives for each.
  bool Concatenates() const { return concatenates_; }
  /// What a token amid others contributes.
  std::string Token(std::string_view token) const;
  /// What the steps behind the first join make of the joined text.
  std::string Finish(std::string text) const;
  std::string Decode(std::vector<std::string> tokens) const;

 private:
  struct Step {
    DecodeStep spec;
    std::unique_ptr<Replacer> replacer;
  };
  static void Apply(const Step& step, size_t max_bytes, std::vector<std::string>* tokens);

  std::vector<Step> steps_;
  size_t num_before_join_;  // steps up to the first that joins, or all
  bool concatenates_ = true;
};

}  // namespace detour::data
