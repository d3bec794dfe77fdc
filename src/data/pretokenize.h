// Cuts text into pre-tokens as the `pre_tokenizer` of a tokenizer.json says.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace detour::data {

/// What becomes of the separators a pattern finds (`tokenizers`' SplitDelimiterBehavior).
enum class SplitBehavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

/// What separates: `pattern` as a regular expression (Oniguruma syntax, as the `tokenizers` package
/// reads it; "" = no cut), `pattern` as it is, or every character of a kind.
enum class Separator { kRegex, kText, kNumeric, kPunctuation, kWhiteSpace };

/// To which pieces a Metaspace step adds its mark.
enum class PrependScheme { kAlways, kFirst, kNever };

/// One step; every step cuts each piece of the step before it.
struct PretokenStep {
  bool add_prefix_space = false;  ///< a piece that does not begin with ' ' gets one first
  /// Metaspace: each ' ' becomes this mark, which then may also be added in front; "" = no such
  /// step. The pattern must be empty.
  std::string metaspace;
  PrependScheme prepend = PrependScheme::kAlways;
  bool split = true;  ///< Metaspace: every mark begins a piece
  std::string pattern;
  Separator separator = Separator::kRegex;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  ///< what the pattern does not match separates
  /// At the end: each byte becomes the character that stands for it (ByteLevel).
  bool byte_characters = false;
};

/// The pattern of GPT-2, which a ByteLevel pre-tokenizer with use_regex implies.
extern const char kGpt2Pattern[];
/// The pattern of a Whitespace pre-tokenizer.
extern const char kWordsPattern[];

/// GPT-2's alphabet: the UTF-8 character that stands for each byte in a vocabulary.
const std::array<std::string, 256>& ByteCharacters();
/// Each byte of `text` as the character that stands for it.
std::string ToByteCharacters(std::string_view text);

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

/// Calls f(begin, end, is_match) for the matches of `regex` in `text` and for what is between them,
/// in order. As Oniguruma's find_iter: an empty match right behind the last match does not count.
template <typename F>
void ForEachMatch(const Regex& regex, std::string_view text, Regex::Scratch* scratch, F&& f) {
  size_t done = 0, start = 0;
  bool matched_before = false;
  Regex::Match match;
  while (start <= text.size() && regex.Find(text, start, scratch, &match)) {
    if (match.begin == match.end && matched_before && match.begin == done) {
      start = match.end + 1;
      while (start < text.size() && (text[start] & 0xC0) == 0x80) ++start;
      continue;
    }
    if (done < match.begin) f(done, match.begin, false);
    f(match.begin, match.end, true);
    done = start = match.end;
    matched_before = true;
  }
  if (done < text.size()) f(done, text.size(), false);
}

/// The same for each place where `text` has `literal` (not empty).
template <typename F>
void ForEachLiteral(std::string_view literal, std::string_view text, F&& f) {
  size_t done = 0;
  for (size_t at; (at = text.find(literal, done)) != std::string_view::npos;) {
    if (done < at) f(done, at, false);
    done = at + literal.size();
    f(at, done, true);
  }
  if (done < text.size()) f(done, text.size(), false);
}

/// Where a piece of text stands.
struct PieceStart {
  /// How many bytes it begins with that come from the first character of the whole text: a piece
  /// with any is the first one, for Metaspace.
  size_t of_first = 0;
  /// The bytes before it were not UTF-8: nothing is put in front of it, so that they come back.
  bool continues = false;

  /// Of the part that begins `offset` bytes on.
  PieceStart Part(size_t offset) const {
    return {of_first > offset ? of_first - offset : 0, continues && offset == 0};
  }
};

/// Called with each pre-token, in order; the view is valid during the call.
using PieceFn = std::function<void(std::string_view)>;

/// Immutable after construction; Split is thread-safe with a Scratch per thread.
class Pretokenizer {
 public:
  explicit Pretokenizer(const std::vector<PretokenStep>& steps);

  /// Pre-tokens of `text`, which must be well-formed UTF-8 and is not empty.
  void Split(std::string_view text, PieceStart start, Regex::Scratch* scratch,
             const PieceFn& emit) const;

 private:
  struct Step {
    PretokenStep spec;
    std::unique_ptr<Regex> regex;  // null: no cut
  };
  struct Call {
    Regex::Scratch* scratch;
    const PieceFn& emit;
    bool has_new;  // characters that the regular expressions do not know
  };
  void Run(size_t step_idx, std::string_view piece, PieceStart start, const Call& call) const;
  void Cut(size_t step_idx, std::string_view piece, PieceStart start, const Call& call) const;
  std::vector<Step> steps_;
};

}  // namespace detour::data
