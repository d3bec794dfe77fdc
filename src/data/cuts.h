// Where a long document may be cut so that its parts encode to the ids of the whole.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

namespace detour::data {

/// Text to token ids; thread-safe. Adds no begin- or end-of-text token.
using EncodeFn = std::function<std::vector<int32_t>(std::string_view)>;

/// The left part is [0, left_end), the right one begins at right_begin: equal, or one further where
/// the tokenizer puts a space before every text by itself (SentencePiece's dummy prefix), so that
/// the space between must go.
struct Cut {
  size_t left_end, right_begin;
};

/// The last cut of `text` with left_end >= `from` and kCutContextBytes of text behind it, or
/// nothing.
///
/// A place qualifies by two rules. (1) It looks like a word boundary that no pre-tokenizer joins
/// over and where no run of characters (white space, digits) is cut, since a regex may treat a run
/// by its length: before a single space between ASCII letters, or after a single newline with
/// neither white space before it nor anything but a letter (or a character outside ASCII) behind
/// it. (2) Encoding the kCutContextBytes on both sides together gives the ids of encoding them one
/// by one. (2) rejects tokenizers and places for which (1) is not enough, such as a merge or an
/// added token across words. So the ids are those of the whole unless a token's fate depends on
/// text further than kCutContextBytes away across a word boundary. SentencePiece's unigram model
/// does so in ties: it adds up f32 scores over all of the text, so that rounding decides more of
/// them the longer the text is.
std::optional<Cut> FindCut(std::string_view text, size_t from, const EncodeFn& encode);

inline constexpr size_t kCutContextBytes = 128;

/// The last UTF-8 boundary at or before `at` (at most 3 bytes before; `at` itself in text that is
/// not UTF-8).
size_t Utf8Boundary(std::string_view text, size_t at);

}  // namespace detour::data
