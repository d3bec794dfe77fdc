// Properties of characters and the Unicode transformations that tokenizers use, each as of the
// Unicode version that the `tokenizers` package has there: the ids must be the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "data/utf8.h"

namespace detour::data {

bool IsWhiteSpace(uint32_t c);
/// Category N (Unicode 17, as Rust's char::is_numeric).
bool IsNumeric(uint32_t c);
/// ASCII punctuation and symbols, or category P (Unicode 8).
bool IsPunctuation(uint32_t c);
/// Category M (Unicode 9).
bool IsCombiningMark(uint32_t c);
/// Alphabetic, M, Nd, Pc or Join_Control (Unicode 16).
bool IsWordCharacter(uint32_t c);

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

/// `text` (well-formed UTF-8) in a normal form (Unicode 9: later characters stay as they are).
std::string Normalize(NormalForm form, std::string_view text);

/// Each character of `text` (well-formed UTF-8) in lower case by itself (Unicode 17; no final
/// sigma).
std::string Lowercase(std::string_view text);

/// PCRE2 knows Unicode 14, Oniguruma 16. Characters of between have here an older one of the same
/// category and UTF-8 length, so that a pattern can be matched against a text of these.
/// Whether `text` (well-formed UTF-8) has such a character.
bool HasNewCharacter(std::string_view text);
/// `text` with each of them replaced; nothing moves.
std::string ReplaceNewCharacters(std::string_view text);

/// Calls f(code point, begin, end) for each character of `text` (well-formed UTF-8).
template <typename F>
void ForEachCharacter(std::string_view text, F&& f) {
  for (size_t begin = 0; begin < text.size();) {
    const int length = ReadUtf8Head(text.substr(begin)).length;
    f(DecodeUtf8(text.substr(begin), length), begin, begin + length);
    begin += length;
  }
}

}  // namespace detour::data
