// One decoder of UTF-8 for the folder: whole, shortest-form characters or single invalid bytes.
#pragma once

#include <cstdint>
#include <string_view>

namespace detour::report {

struct Utf8Char {
  uint32_t code;  ///< the code point; of an invalid byte, that byte
  int length;     ///< bytes used
  bool valid;
};

/// The character at `text[at]`. Requires at < text.size(). Overlong forms, surrogates, values above
/// 10FFFF and cut sequences are invalid, one byte at a time.
inline Utf8Char DecodeUtf8(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(at);
  const Utf8Char invalid{lead, 1, false};
  if (lead < 0x80) return {lead, 1, true};
  const int length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || at + length > text.size()) return invalid;
  uint32_t code = lead & (0x7F >> length);
  for (int i = 1; i < length; ++i) {
    if ((byte(at + i) & 0xC0) != 0x80) return invalid;
    code = code << 6 | (byte(at + i) & 0x3F);
  }
  constexpr uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};
  if (code < kSmallest[length] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
    return invalid;
  }
  return {code, length, true};
}

}  // namespace detour::report
