// Cuts text into pre-tokens as the `pre_tokenizer` of a tokenizer.json says.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace detour::data {

/// What becomes of the separators a pattern finds (`tokenizers`' SplitDelimiterBehavior).
enum class SplitBehavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

/// One step; every step cuts each piece of the step before it.
struct PretokenStep {
  bool add_prefix_space = false;  ///< a piece that does not begin with ' ' gets one first
  std::string pattern;  ///< Oniguruma syntax, as the `tokenizers` package reads it; "" = no cut
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  ///< what the pattern does not match separates
};

/// The pattern of GPT-2, which a ByteLevel pre-tokenizer with use_regex implies.
extern const char kGpt2Pattern[];

/// Translates an Oniguruma pattern into a PCRE2 one with the same matches: \s is White_Space, \w is
/// Alphabetic|M|Nd|Pc (and ²³¹¼½¾ outside sets), ^ and $ work at lines, a set in a set is a union.
/// Error("data.tokenizer") naming the construct where the two differ and no translation is known.
std::string OnigurumaToPcre(std::string_view pattern);

/// A compiled pattern. Immutable.
class Regex {
 public:
  /// Working memory of a match; one per thread.
  class Scratch {
   public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

   private:
    friend class Regex;
    struct Impl;
    std::unique_ptr<Impl> impl_;
  };
  struct Match {
    size_t begin = 0, end = 0;
  };

  /// `pattern` in PCRE2 syntax (UTF, Unicode properties). Error("data.tokenizer") if it does not
  /// compile.
  explicit Regex(const std::string& pattern);

  /// The first match in `text` (well-formed UTF-8) that begins at or after `start`. Error if the
  /// pattern backtracks beyond the limit.
  bool Find(std::string_view text, size_t start, Scratch* scratch, Match* match) const;

 private:
  std::shared_ptr<void> code_;
};

/// Called with each pre-token, in order; the view is valid during the call.
using PieceFn = std::function<void(std::string_view)>;

/// Immutable after construction; Split is thread-safe with a Scratch per thread.
class Pretokenizer {
 public:
  explicit Pretokenizer(const std::vector<PretokenStep>& steps);

  /// Pre-tokens of `text`, which must be well-formed UTF-8 and is not empty.
  void Split(std::string_view text, Regex::Scratch* scratch, const PieceFn& emit) const;

 private:
  struct Step {
    PretokenStep spec;
    std::unique_ptr<Regex> regex;  // null: no cut
  };
  void Run(size_t step_idx, std::string_view piece, Regex::Scratch* scratch,
           const PieceFn& emit) const;
  std::vector<Step> steps_;
};

}  // namespace detour::data
