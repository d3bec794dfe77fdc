#include "report/terminal.h"

#include <gtest/gtest.h>

namespace detour::report {
namespace {

TEST(Terminal, NothingIsLeftToObey) {
  EXPECT_EQ(Harmless("a\tb\nç 世界 👩‍👩‍👧"), "a\tb\nç 世界 👩‍👩‍👧");
  EXPECT_EQ(Harmless("\x1B[2J\x1B]0;title\x07"), "␛[2J␛]0;title␇");
  EXPECT_EQ(Harmless(std::string_view("\0\r\x7F", 3)), "␀␍␡");
  EXPECT_EQ(Harmless("\xC2\x9B"
                     "31m \xC2\xA0"),
            "\uFFFD31m \u00A0");
  EXPECT_EQ(Harmless("\u202Eabc\u2066\u2069\u202F"), "\uFFFDabc\uFFFD\uFFFD\u202F");
  for (int c = 0; c < 0x100; ++c) {
    std::string text;
    if (c < 0x80) {
      text = static_cast<char>(c);
    } else {
      text = {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
    }
    const bool kept = Harmless(text) == text;
    EXPECT_EQ(kept, c == '\n' || c == '\t' || (c >= 0x20 && c < 0x7F) || c >= 0xA0) << c;
  }
}

}  // namespace
}  // namespace detour::report
