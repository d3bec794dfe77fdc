#include "data/cuts.h"

#include <algorithm>

namespace detour::data {
namespace {

constexpr int kMaxTries = 32;  // places that rule (1) accepts and rule (2) rejects

bool IsLetter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool IsContinuation(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

// ASCII and Unicode White_Space (PropList.txt): U+0085, 00A0, 1680, 2000-200A, 2028, 2029, 202F,
// 205F, 3000, as UTF-8.
bool IsSpaceAt(std::string_view s) {
  const auto c = static_cast<unsigned char>(s[0]);
  if (c < 0x80) return c == ' ' || (c >= '\t' && c <= '\r');
  const auto starts = [&](std::string_view prefix) { return s.starts_with(prefix); };
  if (starts("\u0085") || starts("\u00A0") || starts("\u1680") || starts("\u205F") ||
      starts("\u3000")) {
    return true;
  }
  if (!starts("\xE2\x80") || s.size() < 3) return false;
  const auto d = static_cast<unsigned char>(s[2]);
  return d <= 0x8A || d == 0xA8 || d == 0xA9 || d == 0xAF;
}

// Begin of the character that ends before `at` > 0.
size_t CharBefore(std::string_view text, size_t at) {
  size_t begin = at - 1;
  while (begin > 0 && at - begin < 4 && IsContinuation(text[begin])) --begin;
  return begin;
}

bool LooksSafe(std::string_view text, size_t at) {
  if (at == 0 || at + 1 >= text.size()) return false;
  if (text[at] == ' ') return IsLetter(text[at - 1]) && IsLetter(text[at + 1]);
  if (text[at - 1] != '\n' || at < 2) return false;
  if (IsSpaceAt(text.substr(CharBefore(text, at - 1)))) return false;
  return IsLetter(text[at]) ||
         (static_cast<unsigned char>(text[at]) >= 0x80 && !IsSpaceAt(text.substr(at)));
}

bool SameIds(std::string_view text, Cut cut, const EncodeFn& encode) {
  size_t begin = cut.left_end - std::min(cut.left_end, kCutContextBytes);
  while (begin < cut.left_end && IsContinuation(text[begin])) ++begin;
  const size_t end = Utf8Boundary(text, std::min(text.size(), cut.right_begin + kCutContextBytes));
  std::vector<int32_t> parts = encode(text.substr(begin, cut.left_end - begin));
  const std::vector<int32_t> right = encode(text.substr(cut.right_begin, end - cut.right_begin));
  parts.insert(parts.end(), right.begin(), right.end());
  return parts == encode(text.substr(begin, end - begin));
}

}  // namespace

size_t Utf8Boundary(std::string_view text, size_t at) {
  if (at >= text.size()) return text.size();
  size_t boundary = at;
  while (boundary > 0 && at - boundary < 3 && IsContinuation(text[boundary])) --boundary;
  return IsContinuation(text[boundary]) ? at : boundary;
}

std::optional<Cut> FindCut(std::string_view text, size_t from, const EncodeFn& encode) {
  if (text.size() <= kCutContextBytes) return std::nullopt;
  int tries = 0;
  for (size_t at = text.size() - kCutContextBytes; at-- > std::max<size_t>(from, 1);) {
    if (!LooksSafe(text, at)) continue;
    if (SameIds(text, {at, at}, encode)) return Cut{at, at};
    if (text[at] == ' ' && SameIds(text, {at, at + 1}, encode)) return Cut{at, at + 1};
    if (++tries == kMaxTries) break;
  }
  return std::nullopt;
}

}  // namespace detour::data
