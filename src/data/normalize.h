// Changes text as the `normalizer` of a tokenizer.json says.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/pretokenize.h"
#include "data/unicode.h"

namespace detour::data {

/// How long a text of `num_bytes` may become: a few steps that each multiply it could otherwise ask
/// for any amount of memory.
inline size_t MaxReplacedBytes(size_t num_bytes) {
  return std::max(size_t{1} << 24, 64 * num_bytes);
}

/// Replaces what a pattern finds.
class Replacer {
 public:
  /// `pattern` is Oniguruma's regular expression, or (`is_regex` false) text to be found as it is;
  /// not empty. Error("data.tokenizer") if it does not compile.
  Replacer(const std::string& pattern, bool is_regex, std::string content);

  /// `text` (well-formed UTF-8) with every match replaced. `start`, if not null, is kept up to
  /// date. `scratch` may be null: then a regular expression makes its own, which is slow. Error if
  /// the result is longer than `max_bytes`.
  std::string Apply(std::string_view text, size_t max_bytes, PieceStart* start,
                    Regex::Scratch* scratch) const;

 private:
  std::string literal_, content_;
  std::unique_ptr<Regex> regex_;  // null: literal_
};

struct NormalizeStep {
  enum class Kind { kForm, kLowercase, kStripAccents, kStrip, kPrepend, kReplace, kByteLevel };
  Kind kind = Kind::kForm;
  NormalForm form = NormalForm::kNfc;
  bool left = true, right = true;  ///< kStrip: white space of this end goes
  std::string pattern;             ///< kReplace; see Replacer
  bool is_regex = false;
  std::string content;  ///< kPrepend, kReplace
};

/// Immutable after construction; Run is thread-safe with a Scratch per thread.
class Normalizer {
 public:
  /// Error("data.tokenizer") for a pattern that does not compile.
  explicit Normalizer(const std::vector<NormalizeStep>& steps);

  bool empty() const { return steps_.empty(); }
  /// `text` (well-formed UTF-8), changed; `start` then stands for the result.
  std::string Run(std::string_view text, PieceStart* start, Regex::Scratch* scratch) const;

 private:
  struct Step {
    NormalizeStep spec;
    std::unique_ptr<Replacer> replacer;
  };
  std::vector<Step> steps_;
};

}  // namespace detour::data
