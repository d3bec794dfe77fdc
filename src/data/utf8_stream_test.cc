#include "data/utf8_stream.h"

#include <gtest/gtest.h>

#include <string>

#include "core/rng.h"
#include "data/utf8.h"

namespace detour::data {
namespace {

const std::string kBad = "\xEF\xBF\xBD";

std::string Whole(std::string_view bytes) {
  Utf8Stream stream;
  std::string text = stream.Push(bytes);
  return text + stream.Flush();
}

TEST(Utf8Stream, WaitsForTheRestOfACharacter) {
  Utf8Stream stream;
  EXPECT_EQ(stream.Push("a\xF0"), "a");
  EXPECT_EQ(stream.Push("\x9F\x98"), "");
  EXPECT_EQ(stream.Push("\x80"
                        "b"),
            "\xF0\x9F\x98\x80"
            "b");
  EXPECT_EQ(stream.Flush(), "");
}

TEST(Utf8Stream, ReplacesWhatIsCertainlyInvalidAtOnce) {
  Utf8Stream stream;
  EXPECT_EQ(stream.Push("\xFFx"), kBad + "x");
  EXPECT_EQ(stream.Push("\xE2\x82"), "");
  EXPECT_EQ(stream.Push("y"), kBad + "y");
  EXPECT_EQ(stream.Push("\xC3"), "");
  EXPECT_EQ(stream.Flush(), kBad);
  EXPECT_EQ(stream.Flush(), "");
}

// Unicode 15, section 3.9, "U+FFFD substitution of maximal subparts" (tables 3-8 to 3-11).
TEST(Utf8Stream, OneReplacementPerMaximalSubpart) {
  EXPECT_EQ(Whole("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            kBad + kBad + kBad + kBad + kBad + kBad + kBad + kBad + "A");
  EXPECT_EQ(Whole("\xED\xA0\x80\x41"), kBad + kBad + kBad + "A");
  EXPECT_EQ(Whole("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"),
            kBad + kBad + kBad + kBad + kBad + "A" + kBad + kBad + "B");
  EXPECT_EQ(Whole("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), kBad + kBad + kBad + kBad + "A");
}

TEST(Utf8Stream, OutputDoesNotDependOnTheCuts) {
  const Rng rng(1, RngPurpose::kTest);
  uint64_t draw = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string bytes;
    for (uint64_t n = rng.Below(draw++, 24); n > 0; --n) {
      static const std::string kinds[] = {"\xF0", "\x9F", "\x80", "a", "\xE2", "\xC3",
                                          "\xED", "\xF4", "\xBF", "é", "世",   "😀"};
      bytes += kinds[rng.Below(draw++, std::size(kinds))];
    }
    Utf8Stream stream;
    std::string text;
    for (size_t at = 0; at < bytes.size();) {
      const size_t n = rng.Below(draw++, 4);
      text += stream.Push(std::string_view(bytes).substr(at, n));
      EXPECT_EQ(ValidUtf8Prefix(text), text.size());
      at += n;
    }
    EXPECT_EQ(text + stream.Flush(), Whole(bytes));
  }
}

TEST(Utf8, EveryCodePointThereAndBack) {
  for (uint32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string text;
    AppendUtf8(c, &text);
    const Utf8Head head = ReadUtf8Head(text);
    ASSERT_EQ(head.kind, Utf8Kind::kValid) << c;
    ASSERT_EQ(head.length, text.size()) << c;
    ASSERT_EQ(DecodeUtf8(text, head.length), c);
  }
}

TEST(Utf8, ValidPrefixEndsAtTheFirstBadByte) {
  for (size_t at = 0; at < 40; ++at) {
    std::string text(40, 'x');
    EXPECT_EQ(ValidUtf8Prefix(text), 40);
    text[at] = '\xA9';
    EXPECT_EQ(ValidUtf8Prefix(text), at);
    if (at == 0) continue;
    text[at - 1] = '\xC3';
    EXPECT_EQ(ValidUtf8Prefix(text), 40);
  }
  EXPECT_EQ(ValidUtf8Prefix("ab\xE2\x82"), 2);
  EXPECT_EQ(ValidUtf8Prefix(""), 0);
}

}  // namespace
}  // namespace detour::data
