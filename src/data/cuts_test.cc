#include "data/cuts.h"

#include <gtest/gtest.h>

#include <string>

#include "core/rng.h"
#include "data/test_encoder.h"

namespace detour::data {
namespace {

// Pieces joined at random, rich in what pre-tokenizers treat specially.
std::string RandomText(uint64_t seed, size_t num_pieces) {
  static const std::vector<std::string> kPieces = {
      "word", "The",    " ",      "  ",    "\n",     "\n\n", "\r\n",   "\t", ".",
      ",",    "...",    "'s",     "'t",    "don't",  "12",   "34567",  "é",  "日本語",
      "。",   "\u3000", "\u00a0", "🙂",  "\u0301", "/",    "-",      "_",  "a",
      "I",    "\"",     " the",   " of",   " and",   " cat", "\nNext", " x", "(",
      ")",    "\xff",   "\u200d", "Ünder", "\n#"};
  const Rng rng(seed, RngPurpose::kTest);
  std::string text;
  for (size_t i = 0; i < num_pieces; ++i) text += kPieces[rng.Below(i, kPieces.size())];
  return text;
}

void ExpectCutsKeepIds(const EncodeFn& encode, const std::string& text, int* num_cuts) {
  const std::vector<int32_t> whole = encode(text);
  // Every cut there is, walking back from each one found.
  for (size_t size = text.size();;) {
    const auto cut = FindCut(std::string_view(text).substr(0, size), 0, encode);
    if (!cut) break;
    std::vector<int32_t> parts = encode(text.substr(0, cut->left_end));
    const std::vector<int32_t> right = encode(text.substr(cut->right_begin));
    parts.insert(parts.end(), right.begin(), right.end());
    ASSERT_EQ(parts, whole) << "cut at " << cut->left_end << " of " << text.size();
    ++*num_cuts;
    size = cut->left_end + kCutContextBytes;
  }
}

TEST(FindCut, IdsAreThoseOfTheWhole) {
  for (const char* pattern : {kGpt2Regex, kLlama3Regex, kO200kRegex}) {
    int num_cuts = 0;
    const EncodeFn encode = RegexEncoder(pattern);
    for (uint64_t seed = 0; seed < 150; ++seed) {
      ExpectCutsKeepIds(encode, RandomText(seed, 300), &num_cuts);
    }
    EXPECT_GT(num_cuts, 500) << pattern;
  }
}

TEST(FindCut, DropsTheSpaceWhereTheTokenizerPutsOne) {
  const EncodeFn words = RegexEncoder("\u2581*[^\u2581]+");
  const EncodeFn encode = [&](std::string_view text) {
    std::string marked = "\u2581";
    for (const char c : text) marked += c == ' ' ? std::string("\u2581") : std::string(1, c);
    return words(marked);
  };
  int num_cuts = 0;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    ExpectCutsKeepIds(encode, RandomText(seed, 300), &num_cuts);
  }
  EXPECT_GT(num_cuts, 100);
  std::string text;
  for (int i = 0; i < 100; ++i) text += " some words";
  const auto cut = FindCut(text, 0, encode);
  ASSERT_TRUE(cut);
  EXPECT_EQ(cut->right_begin, cut->left_end + 1);
}

TEST(FindCut, RefusesWhatIsNotTheSame) {
  // A tokenizer whose ids depend on all of the text.
  const EncodeFn encode = [](std::string_view text) {
    return std::vector<int32_t>(1, static_cast<int32_t>(text.size()));
  };
  std::string text;
  for (int i = 0; i < 200; ++i) text += "some words\n";
  EXPECT_FALSE(FindCut(text, 0, encode));
  const EncodeFn regex = RegexEncoder(kGpt2Regex);
  EXPECT_FALSE(FindCut(std::string(5000, 'a'), 0, regex));
  EXPECT_FALSE(FindCut(std::string(5000, ' '), 0, regex));
  EXPECT_FALSE(FindCut(std::string(5000, '\n'), 0, regex));
  EXPECT_FALSE(FindCut(std::string(5000, '7'), 0, regex));
  EXPECT_FALSE(FindCut("", 0, regex));
  EXPECT_FALSE(FindCut("two words", 0, regex));
  const auto cut = FindCut(text, 0, regex);
  ASSERT_TRUE(cut);
  EXPECT_FALSE(FindCut(text, cut->left_end + 1, regex));
}

TEST(Utf8Boundary, NeverInsideACharacter) {
  const std::string text = "a\u00e9\u65e5\U0001F642b";
  const size_t begins[] = {0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11};
  for (size_t at = 0; at < std::size(begins); ++at) {
    EXPECT_EQ(Utf8Boundary(text, at), begins[at]) << at;
  }
  EXPECT_EQ(Utf8Boundary("\x80\x80\x80\x80\x80\x80", 5), 5);
}

}  // namespace
}  // namespace detour::data
