// Well-formed UTF-8 (Unicode 15, table 3-7) told from other bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace detour::data {

enum class Utf8Kind {
  kValid,       ///< a whole character
  kInvalid,     ///< no continuation can make these bytes a character
  kIncomplete,  ///< the text ends inside what may become a character
};

struct Utf8Head {
  Utf8Kind kind;
  /// Bytes of the character, or of the "maximal subpart" that one U+FFFD replaces (>= 1).
  int length;
};

/// What `text` begins with. Requires a text that is not empty.
Utf8Head ReadUtf8Head(std::string_view text);

/// The code point of the well-formed character that `text` begins with, `length` bytes long.
uint32_t DecodeUtf8(std::string_view text, int length);

/// Appends `code_point` (< 0x110000, no surrogate) as UTF-8.
void AppendUtf8(uint32_t code_point, std::string* out);

/// Length of the longest prefix of `text` that is well-formed.
size_t ValidUtf8Prefix(std::string_view text);

}  // namespace detour::data
