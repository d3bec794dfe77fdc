#include "data/utf8.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace detour::data {

Utf8Head ReadUtf8Head(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {Utf8Kind::kValid, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Kind::kInvalid, 1};
  const int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // The second byte's range excludes overlong forms, surrogates and what is above U+10FFFF.
  uint8_t low = 0x80, high = 0xBF;
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (int i = 1; i < length; ++i) {
    if (i == static_cast<int>(text.size())) return {Utf8Kind::kIncomplete, i};
    if (byte(i) < low || byte(i) > high) return {Utf8Kind::kInvalid, i};
    low = 0x80, high = 0xBF;
  }
  return {Utf8Kind::kValid, length};
}

uint32_t DecodeUtf8(std::string_view text, int length) {
  const uint8_t lead = static_cast<uint8_t>(text[0]);
  if (length == 1) return lead;
  uint32_t code_point = lead & (0x7F >> length);
  for (int i = 1; i < length; ++i) code_point = code_point << 6 | (text[i] & 0x3F);
  return code_point;
}

void AppendUtf8(uint32_t code_point, std::string* out) {
  const auto put = [&](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
    return;
  }
  const int tail = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
  put((0xFF00 >> (tail + 1) & 0xFF) | code_point >> (6 * tail));
  for (int i = tail - 1; i >= 0; --i) put(0x80 | (code_point >> (6 * i) & 0x3F));
}

size_t ValidUtf8Prefix(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    uint64_t word;
    while (i + sizeof(word) <= text.size()) {
      std::memcpy(&word, text.data() + i, sizeof(word));
      if (word & 0x8080808080808080u) break;
      i += sizeof(word);
    }
    if (i == text.size()) break;
    const Utf8Head head = ReadUtf8Head(text.substr(i));
    if (head.kind != Utf8Kind::kValid) break;
    i += head.length;
  }
  return i;
}

}  // namespace detour::data
