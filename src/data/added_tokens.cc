#include "data/added_tokens.h"

namespace detour::data {
namespace {

/// Where the last character of text[0, end) begins.
size_t LastCharacter(std::string_view text, size_t end) {
  size_t begin = end - 1;
  while ((text[begin] & 0xC0) == 0x80) --begin;
  return begin;
}

uint32_t CharacterAt(std::string_view text, size_t begin) {
  text.remove_prefix(begin);
  return DecodeUtf8(text, ReadUtf8Head(text).length);
}

}  // namespace

bool AddedTokenFinder::Add(std::string_view content, int32_t idx) {
  uint64_t node = 0;
  for (const char c : content) {
    const auto [it, added] =
        edges_.try_emplace(node << 8 | static_cast<uint8_t>(c), static_cast<uint32_t>(idx_.size()));
    if (added) idx_.push_back(-1);
    node = it->second;
  }
  if (idx_[node] >= 0) return false;
  idx_[node] = idx;
  first_[static_cast<uint8_t>(content[0])] = true;
  return true;
}

bool AddedTokenFinder::Find(std::string_view text, size_t start, Match* match) const {
  if (edges_.empty()) return false;
  for (size_t begin = start; begin < text.size(); ++begin) {
    if (!first_[static_cast<uint8_t>(text[begin])]) continue;
    uint64_t node = 0;
    bool found = false;
    for (size_t i = begin; i < text.size(); ++i) {
      const auto it = edges_.find(node << 8 | static_cast<uint8_t>(text[i]));
      if (it == edges_.end()) break;
      node = it->second;
      if (idx_[node] < 0) continue;
      *match = {begin, i + 1, idx_[node]};
      found = true;
    }
    if (found) return true;
  }
  return false;
}

size_t TrailingSpace(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    const size_t begin = LastCharacter(text, end);
    if (!IsWhiteSpace(CharacterAt(text, begin))) break;
    end = begin;
  }
  return end;
}

size_t SkipSpace(std::string_view text, size_t begin) {
  while (begin < text.size() && IsWhiteSpace(CharacterAt(text, begin))) {
    begin += ReadUtf8Head(text.substr(begin)).length;
  }
  return begin;
}

bool StandsAlone(std::string_view text, size_t begin, size_t end) {
  if (begin > 0 && IsWordCharacter(CharacterAt(text, LastCharacter(text, begin)))) return false;
  return end == text.size() || !IsWordCharacter(CharacterAt(text, end));
}

}  // namespace detour::data
