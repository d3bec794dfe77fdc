#include "data/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"
#include "core/sha256.h"
#include "data/bpe_trainer.h"
#include "data/gguf_tokenizer.h"
#include "io/atomic.h"

namespace detour::data {
namespace {

const char kText[] =
    "The union of these States, the happiness of the people of these States: the union is the "
    "people's. We'll see 1789 and 1790 and 1791 — état, état, état, 世界 世界!\n\n\tThe end.\n\n";

BpeSpec TrainOn(std::string_view text, int32_t vocab_size = 400) {
  BpeTrainer trainer({.vocab_size = vocab_size});
  trainer.Feed(text);
  trainer.EndText();
  return trainer.Train();
}

const Tokenizer& Small() {
  static const BpeTokenizer tokenizer(TrainOn(kText));
  return tokenizer;
}

// A whole small file, in which a test replaces parts.
Json FileJson() { return Json::parse(WriteTokenizerJson(TrainOn(kText, 300))); }

std::string LoadError(const std::string& text) {
  try {
    LoadTokenizerJson(text, "x.json");
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
    EXPECT_LT(std::string(e.what()).size(), 600);
    return e.what();
  }
  return "no error";
}
std::string LoadError(const Json& json) { return LoadError(json.dump()); }

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(BpeTokenizer, TextIsShorterInTokensAndComesBack) {
  const std::vector<int32_t> ids = Small().Encode(kText);
  EXPECT_LT(ids.size(), sizeof(kText) / 2);
  EXPECT_EQ(Small().Decode(ids), kText);
  EXPECT_EQ(Small().TokenText(Small().Encode(" the")[0]), "Ġthe");
  EXPECT_EQ(Small().TokenId("Ġthe"), Small().Encode(" the")[0]);
  EXPECT_FALSE(Small().TokenId("no such token"));
}

TEST(BpeTokenizer, AnyBytesComeBack) {
  const Rng rng(7, RngPurpose::kTest);
  uint64_t draw = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string bytes;
    for (uint64_t n = rng.Below(draw++, 64); n > 0; --n) {
      const uint64_t kind = rng.Below(draw++, 4);
      if (kind == 0) bytes += static_cast<char>(rng.Below(draw++, 256));
      if (kind == 1) bytes += static_cast<char>(' ' + rng.Below(draw++, 90));
      if (kind == 2) bytes += std::string_view(kText).substr(rng.Below(draw++, 100), 7);
      if (kind == 3) bytes += round % 2 ? "世" : "\xE4\xB8";
    }
    EXPECT_EQ(Small().Decode(Small().Encode(bytes)), bytes);
  }
}

TEST(BpeTokenizer, BytesThatAreNotUtf8AreOneTokenEachAndSplitTheText) {
  const auto ids = Small().Encode("the\xC3 the");
  std::vector<int32_t> expected = Small().Encode("the");
  expected.push_back(*Small().TokenId("Ã"));
  for (const int32_t id : Small().Encode(" the")) expected.push_back(id);
  EXPECT_EQ(ids, expected);
  EXPECT_EQ(Small().Encode("\xE4\xB8").size(), 2);
}

TEST(BpeTokenizer, SpecialTokensInTheText) {
  const std::string text = "a<|endoftext|>b";
  const auto ids = Small().Encode(text);
  ASSERT_EQ(ids.size(), 3);
  EXPECT_EQ(ids[1], 0);
  EXPECT_TRUE(Small().IsSpecial(0));
  EXPECT_FALSE(Small().IsSpecial(ids[0]));
  EXPECT_EQ(Small().Decode(ids), text);
  EXPECT_EQ(Small().Decode(ids, true), "ab");
  const auto plain = Small().Encode(text, {.parse_special = false});
  EXPECT_GT(plain.size(), 3);
  EXPECT_EQ(std::count(plain.begin(), plain.end(), 0), 0);
  EXPECT_EQ(Small().Decode(plain), text);
}

TEST(BpeTokenizer, IdsOutOfRangeAreErrors) {
  EXPECT_THROW(Small().DecodeToken(-1), Error);
  EXPECT_THROW(Small().DecodeToken(Small().vocab_size()), Error);
  EXPECT_THROW(Small().Decode(std::vector<int32_t>{1, 1 << 30}), Error);
  EXPECT_THROW(Small().IsSpecial(-5), Error);
  EXPECT_THROW(Small().TokenText(1 << 20), Error);
}

TEST(BpeTokenizer, ThreadsShareOne) {
  const std::string text = std::string(kText) + kText;
  const std::vector<int32_t> expected = Small().Encode(text);
  std::vector<std::thread> threads;
  std::vector<int> good(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) good[t] += Small().Encode(text) == expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, std::vector<int>(4, 200));
}

// A quadratic merge of this word would take hours.
TEST(BpeTokenizer, LongWordsTakeNLogN) {
  std::string word;
  for (uint64_t i = 0; i < 2'000'000; ++i) word += "thesao"[i * i % 6];
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(Small().Decode(Small().Encode(word)), word);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST(BpeTokenizer, ShortAndLongMergesAgree) {
  const Rng rng(3, RngPurpose::kTest);
  // Words just under and over the length at which the heap takes over: every part before a seam
  // that no merge crosses must encode alike.
  for (uint64_t round = 0; round < 300; ++round) {
    std::string word;
    for (uint64_t i = 0; i < 40; ++i) word += "theunioafsp"[rng.Below(round * 64 + i, 11)];
    const auto alone = Small().Encode(word);
    const auto both = Small().Encode(word + "qqqqqqqqqqqqqqqqqqqq");
    ASSERT_EQ(both.size(), alone.size() + 20);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), both.begin()));
  }
}

TEST(TokenizerJson, WritesWhatItReads) {
  const BpeSpec spec = TrainOn(kText);
  const BpeSpec again = ParseTokenizerJson(WriteTokenizerJson(spec), "x.json");
  EXPECT_EQ(again.vocab, spec.vocab);
  EXPECT_EQ(again.merges, spec.merges);
}

TEST(TokenizerJson, NamesWhatItDoesNotRead) {
  const auto with = [](const char* pointer, Json value) {
    Json json = FileJson();
    json[Json::json_pointer(pointer)] = std::move(value);
    return LoadError(json);
  };
  EXPECT_HAS(with("/normalizer", {{"type", "Nmt"}}), "unsupported normalizer \"Nmt\"");
  EXPECT_HAS(with("/pre_tokenizer", {{"type", "UnicodeScripts"}}),
             "unsupported pre_tokenizer \"UnicodeScripts\"");
  EXPECT_HAS(with("/decoder", {{"type", "WordPiece"}}), "\"WordPiece\"");
  EXPECT_HAS(with("/model/type", "Unigram"), "\"Unigram\"");
  EXPECT_HAS(with("/model/dropout", 0.1), "dropout");
  EXPECT_HAS(with("/decoder", nullptr), "unsupported decoder \"null\"");
  EXPECT_HAS(with("/post_processor", {{"type", "Nosuch"}}), "unsupported post_processor");
  EXPECT_HAS(with("/pre_tokenizer", {{"type", "Punctuation"}, {"behavior", "Nosuch"}}),
             "unsupported behavior \"Nosuch\"");
  const auto metaspace = [](const char* scheme) -> Json {
    return {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", scheme}};
  };
  EXPECT_HAS(with("/pre_tokenizer", metaspace("nosuch")), "unsupported prepend_scheme \"nosuch\"");
  EXPECT_EQ(with("/pre_tokenizer", metaspace("first")), "no error");
  const auto pattern = [&](const char* regex) {
    return with("/pre_tokenizer",
                {{"type", "Sequence"},
                 {"pretokenizers",
                  {{{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}},
                   {{"type", "ByteLevel"}, {"use_regex", false}}}}});
  };
  EXPECT_HAS(pattern("a{1,3}+"), "{n,m}+");
  EXPECT_HAS(pattern("[a&&b]"), "&&");
  EXPECT_HAS(pattern("[a[^b]]"), "[^ in a set");
  EXPECT_HAS(pattern("(a"), "pattern");
  EXPECT_HAS(pattern("a\\"), "pattern");
  EXPECT_HAS(pattern(""), "empty pattern");
}

// A vocabulary of text with byte tokens, as Llama 2 has.
GgufTokenizer Pieces() {
  GgufTokenizer gguf{.model = "llama", .tokens = {"<unk>", "<s>", "</s>"}};
  gguf.token_type = {2, 3, 3};
  const auto add = [&](const std::string& token, int32_t type) {
    gguf.tokens.push_back(token);
    gguf.token_type.push_back(type);
  };
  for (int b = 0; b < 256; ++b) add(fmt::format("<0x{:02X}>", b), 6);
  for (const char* piece : {"ab", "▁a", "abc", "▁ab", "▁▁", "▁", "a", "b", "c"}) add(piece, 1);
  add("<tool>", 4);
  for (size_t i = 0; i < gguf.tokens.size(); ++i) gguf.scores.push_back(-static_cast<float>(i));
  gguf.bos_token_id = 1;
  gguf.eos_token_id = 2;
  return gguf;
}

TEST(GgufTokenizer, MergesByScoreAndFallsBackToBytes) {
  const auto tokenizer = Tokenizer::FromGguf(Pieces(), "x.gguf");
  const auto spelled = [&](const std::string& text, const EncodeOptions& options = {}) {
    std::string all;
    for (const int32_t id : tokenizer->Encode(text, options)) {
      all.append(tokenizer->TokenText(id)).push_back('|');
    }
    return all;
  };
  // "ab" has the higher score, though "▁a" comes first.
  EXPECT_EQ(spelled("abc"), "▁|abc|");
  EXPECT_EQ(spelled("a"), "▁a|");
  EXPECT_EQ(spelled("aé", {.add_special_tokens = true}), "<s>|▁a|<0xC3>|<0xA9>|");
  EXPECT_EQ(spelled("a<tool>b</s>"), "▁a|<tool>|▁|b|</s>|");
  EXPECT_EQ(spelled("</s>", {.parse_special = false}).find("</s>"), std::string::npos);
  EXPECT_EQ(tokenizer->eos_id(), 2);
  EXPECT_EQ(tokenizer->DecodeToken(*tokenizer->TokenId("▁ab")), " ab");
  for (const std::string& text : {std::string("a  b\n"), std::string("a\xFF b\xC3"),
                                  std::string("\x80\xFE a"), std::string("  世 \0", 7)}) {
    EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(text)), text) << Printable(text);
  }
}

TEST(GgufTokenizer, IsTheTokenizerJsonThatItWrites) {
  GgufTokenizer gguf = Pieces();
  gguf.add_eos_token = true;
  const auto tokenizer = Tokenizer::FromGguf(gguf, "x.gguf");
  const std::string json = WriteTokenizerJson(ReadGgufTokenizer(gguf, "x.gguf"));
  const auto again = LoadTokenizerJson(json, "x.json");
  EXPECT_EQ(tokenizer->fingerprint(), Sha256Hex(json));
  for (const char* text : {"abc ab  a b", "é<tool> c", ""}) {
    const auto ids = tokenizer->Encode(text, {.add_special_tokens = true});
    EXPECT_EQ(ids, again->Encode(text, {.add_special_tokens = true}));
    EXPECT_EQ(ids.back(), 2);
    EXPECT_EQ(tokenizer->Decode(ids), again->Decode(ids));
  }
}

TEST(GgufTokenizer, TrustsNothing) {
  const auto error = [](const std::function<void(GgufTokenizer&)>& change) -> std::string {
    GgufTokenizer gguf = Pieces();
    change(gguf);
    try {
      Tokenizer::FromGguf(gguf, "x.gguf");
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(error([](GgufTokenizer&) {}), "no error");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.model = std::string("bert"); }),
             "tokenizer.ggml.model \"bert\"");
  EXPECT_HAS(
      error([](GgufTokenizer& g) { g = {.model = "gpt2", .pre = "chatglm", .tokens = {"a"}}; }),
      "tokenizer.ggml.pre \"chatglm\"");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.tokens.clear(); }), "0 tokens");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.scores.pop_back(); }), "scores for");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.scores.clear(); }), "scores is missing");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.scores[5] = NAN; }), "not a number");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.token_type.pop_back(); }), "token types");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.token_type[4] = 9; }), "type 9");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.tokens[260] = std::string("\xFF"); }), "not UTF-8");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.tokens[260] = std::string(5000, 'a'); }), "5000 bytes");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.bos_token_id = 1 << 30; }), "bos_token_id");
  EXPECT_HAS(error([](GgufTokenizer& g) { g.eos_token_id = -1; }), "eos_token_id");
  EXPECT_HAS(error([](GgufTokenizer& g) {
               g.bos_token_id = {};
               g.add_bos_token = true;
             }),
             "add_bos_token without");
  EXPECT_HAS(error([](GgufTokenizer& g) {
               g = {.model = "gpt2", .tokens = {"a", "b"}, .merges = {"a b"}};
             }),
             "\"ab\" is not a token");
}

TEST(TokenizerJson, AddedTokensThatNormalizeToNothingOrTheSame) {
  Json json = FileJson();
  json["normalizer"] = {{"type", "Strip"}, {"strip_left", true}, {"strip_right", true}};
  const int64_t size = json["model"]["vocab"].size();
  json["added_tokens"].push_back({{"id", size}, {"content", "  "}, {"normalized", true}});
  EXPECT_HAS(LoadError(json), "nothing is left");
  json["added_tokens"][1]["content"] = " the";
  json["added_tokens"].push_back({{"id", size + 1}, {"content", "the "}, {"normalized", true}});
  EXPECT_HAS(LoadError(json), "the same as another");
}

TEST(TokenizerJson, ReplacesThatMultiplyEndInAnError) {
  Json twice = Json::array();
  for (int i = 0; i < 60; ++i) {
    twice.push_back({{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}});
  }
  Json json = FileJson();
  json["normalizer"] = {{"type", "Sequence"}, {"normalizers", twice}};
  const auto tokenizer = LoadTokenizerJson(json.dump(), "x.json");
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode("the")), "the");
  EXPECT_THROW(tokenizer->Encode("a"), Error);
  json = FileJson();
  json["decoder"] = {{"type", "Sequence"}, {"decoders", twice}};
  EXPECT_HAS(LoadError(json), "a Replace makes more than");
}

TEST(Unicode, NewCharactersHaveOldOnesOfTheirLength) {
  EXPECT_FALSE(HasNewCharacter("abc état 世界 👩 ٣"));
  for (const char* text : {"\u0897", "a\u1C89b", "\U00031350", "世\U0001FAE9 "}) {
    EXPECT_TRUE(HasNewCharacter(text)) << text;
    const std::string old = ReplaceNewCharacters(text);
    EXPECT_EQ(old.size(), std::string(text).size());
    EXPECT_FALSE(HasNewCharacter(old));
  }
}

TEST(TokenizerJson, TrustsNothing) {
  EXPECT_HAS(LoadError(std::string("")), "json");
  EXPECT_HAS(LoadError(std::string("[]")), "expected an object");
  EXPECT_HAS(LoadError(std::string("{}")), "model");
  EXPECT_HAS(LoadError(std::string(100'000, '[')), "json");
  const auto patch = [](const char* pointer, Json value) {
    Json json = FileJson();
    json[Json::json_pointer(pointer)] = std::move(value);
    return LoadError(json);
  };
  EXPECT_HAS(patch("/model/vocab", Json::object()), "empty vocabulary");
  EXPECT_HAS(patch("/model/vocab/a", -1), "expected an id in");
  EXPECT_HAS(patch("/model/vocab/a", 1.0), "expected an id in");
  EXPECT_HAS(patch("/model/vocab/a", 3'000'000'000'000), "expected an id in");
  EXPECT_HAS(patch("/model/vocab/a", 2'000'000), "expected an id in");
  EXPECT_HAS(patch("/model/vocab/a", 5), "is given to two tokens");
  EXPECT_HAS(patch("/model/merges/0", "a"), "one space");
  EXPECT_HAS(patch("/model/merges/0", "a b c"), "one space");
  EXPECT_HAS(patch("/model/merges/0", 7), "a merge is neither");
  EXPECT_HAS(patch("/model/merges/0", "a nosuch"), "not in the vocabulary");
  EXPECT_HAS(patch("/model/merges/0", "a q"), "\"aq\", which is not in the vocabulary");
  EXPECT_HAS(patch("/model/unk_token", "<nosuch>"), "unk_token");
  EXPECT_HAS(patch("/added_tokens/0/id", -3), "id");
  EXPECT_HAS(patch("/added_tokens/0/id", 1 << 30), "id");
  EXPECT_HAS(patch("/added_tokens/0/id", 7), "id 7 here, 0 elsewhere");
  EXPECT_HAS(patch("/added_tokens/0/content", "<new>"), "is token \"<|endoftext|>\"");
  const Json twice = {{"id", 0}, {"content", "<|endoftext|>"}};
  EXPECT_HAS(patch("/added_tokens/1", twice), "given twice");
  EXPECT_HAS(patch("/post_processor", {{"type", "TemplateProcessing"}, {"single", Json::array()}}),
             "lacks the text");
}

// Patterns whose matching would take exponential time end in an error.
TEST(TokenizerJson, ARunawayPatternIsAnError) {
  BpeSpec spec = TrainOn(kText);
  spec.pretokenize = {{.pattern = "(?:a+)+(?<!a)"}};
  const BpeTokenizer tokenizer(spec);
  EXPECT_THROW(tokenizer.Encode(std::string(5000, 'a')), Error);
}

TEST(Pretokenize, TranslatesOniguruma) {
  EXPECT_EQ(OnigurumaToPcre(R"([^\s\p{L}]+|\s+(?!\S))"),
            R"([^\p{White_Space}\p{L}]+|\p{White_Space}+(?!\P{White_Space}))");
  EXPECT_EQ(OnigurumaToPcre(R"([^(\s|[.,])]+)"), R"([^(\p{White_Space}|.,)]+)");
  EXPECT_EQ(OnigurumaToPcre(R"(a{,2}b{3}\[[]x])"), R"(a{0,2}b{3}\[[\]x])");
}

TEST(Trainer, CutsOfTheInputDoNotMatter) {
  std::string text;
  for (int i = 0; i < 40; ++i) text += kText + std::to_string(i * i) + "'re \xFF\xC3 x\n \n  y'l";
  const BpeSpec whole = TrainOn(text, 500);
  for (const size_t step : {1, 7, 64, 1000}) {
    BpeTrainer trainer({.vocab_size = 500});
    for (size_t at = 0; at < text.size(); at += step) {
      trainer.Feed(std::string_view(text).substr(at, step));
    }
    trainer.EndText();
    EXPECT_EQ(trainer.Train().merges, whole.merges);
  }
}

// Longer than a block, so that the trainer counts before it has seen the end.
TEST(Trainer, BlocksDoNotChangeTheCounts) {
  const Rng rng(5, RngPurpose::kTest);
  const std::string_view parts[] = {"don't", " we're", "  ",     "\n",        "\n\n \n",
                                    "世界",  " été",   " 12345", "'ll",       "\xFF",
                                    " word", "...",    "\t",     "aaaaaaaaaa"};
  std::string text;
  for (uint64_t i = 0; text.size() < 5'000'000; ++i) text += parts[rng.Below(i, std::size(parts))];
  BpeTrainer trainer({});
  trainer.Feed(text);
  trainer.EndText();
  // What the tokenizer's own pre-tokenizer finds in the whole text.
  const Pretokenizer pretokenizer(Gpt2Pretokenize());
  Regex::Scratch scratch;
  int64_t expected = 0;
  for (size_t at = 0; at < text.size();) {
    size_t end = text.find('\xFF', at);
    if (end == std::string::npos) end = text.size();
    if (end > at) {
      pretokenizer.Split(std::string_view(text).substr(at, end - at), {}, &scratch,
                         [&](std::string_view) { ++expected; });
    }
    at = end + 1;
  }
  EXPECT_EQ(trainer.num_words(), expected);
}

TEST(Trainer, MemoryIsBounded) {
  const Rng rng(9, RngPurpose::kTest);
  BpeTrainer trainer({.vocab_size = 400, .max_table_bytes = 1 << 20});
  for (uint64_t i = 0; i < 100'000; ++i) trainer.Feed(fmt::format(" x{:x} common", rng.Bits(i)));
  trainer.EndText();
  EXPECT_LT(trainer.num_distinct_words(), 20'000);
  const BpeSpec spec = trainer.Train();
  EXPECT_NE(std::find(spec.vocab.begin(), spec.vocab.end(), "Ġcommon"), spec.vocab.end());
  BpeTrainer endless({});
  for (int i = 0; i < 40; ++i) endless.Feed(std::string(1 << 20, 'a'));
  endless.EndText();
  EXPECT_LT(endless.num_distinct_words(), 10);
}

TEST(Trainer, RefusesWhatCannotBe) {
  EXPECT_THROW(BpeTrainer({.vocab_size = 256}), Error);
  EXPECT_THROW(BpeTrainer({.vocab_size = -1}), Error);
  EXPECT_THROW(BpeTrainer({.special_tokens = {""}}), Error);
  EXPECT_THROW(BpeTrainer({.special_tokens = {"<s>", "<s>"}}), Error);
  EXPECT_THROW(BpeTrainer({.special_tokens = {"\xFF"}}), Error);
}

TEST(Trainer, NoTextGivesTheBytes) {
  BpeTrainer trainer({.vocab_size = 1000});
  trainer.EndText();
  const BpeTokenizer tokenizer(trainer.Train());
  EXPECT_EQ(tokenizer.vocab_size(), 257);
  EXPECT_EQ(tokenizer.Encode("abc").size(), 3);
}

class TokenizerDir : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "tokenizer_test_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::string LoadError() const {
    try {
      Tokenizer::Load(dir_);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  }
  std::string dir_;
};

TEST_F(TokenizerDir, RoundTrip) {
  WriteTokenizerDir(TrainOn(kText), "<|endoftext|>", dir_ + "/new/tok");
  const auto tokenizer = Tokenizer::Load(dir_ + "/new/tok");
  EXPECT_EQ(tokenizer->Encode(kText), Small().Encode(kText));
  EXPECT_EQ(tokenizer->eos_id(), 0);
  EXPECT_EQ(tokenizer->bos_id(), 0);
  EXPECT_FALSE(tokenizer->pad_id());
  EXPECT_EQ(tokenizer->fingerprint().size(), 64);
  EXPECT_EQ(Tokenizer::Load(dir_ + "/new/tok/tokenizer.json")->eos_id(), 0);
}

TEST_F(TokenizerDir, Errors) {
  EXPECT_HAS(LoadError(), "got neither");
  io::WriteFile(dir_ + "/tokenizer.model", "IQ== 0\nIg== 1\n");
  EXPECT_HAS(LoadError(), "not a SentencePiece model");
  io::WriteFile(dir_ + "/tokenizer.model", "");
  EXPECT_HAS(LoadError(), "not a SentencePiece model");
  WriteTokenizerDir(TrainOn(kText), "<|endoftext|>", dir_);
  io::WriteFile(dir_ + "/tokenizer_config.json", R"({"eos_token": "<nosuch>"})");
  EXPECT_HAS(LoadError(), "eos_token \"<nosuch>\"");
  io::WriteFile(dir_ + "/tokenizer_config.json",
                R"({"eos_token": {"content": "the"}, "pad_token": "no"})");
  EXPECT_EQ(LoadError(), "no error");
  EXPECT_THROW(Tokenizer::Load(dir_ + "/nosuch"), Error);
}

}  // namespace
}  // namespace detour::data
