#include "core/json.h"

#include <gtest/gtest.h>

#include <chrono>
#include <functional>

namespace detour {
namespace {

// The message of the Error that `run` throws; empty if none.
std::string Message(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  }
  return "";
}
std::string ParseMessage(const std::string& text) {
  return Message([&] { ParseJson(text, "x.json"); });
}

TEST(ParseJson, KeepsOrderAndTypes) {
  const Json json = ParseJson(R"({"b":[1,-2,2.5,1e3,true,null,"\u00e9\ud83d\ude00"],"a":{}})", "x");
  EXPECT_EQ(json.dump(), R"({"b":[1,-2,2.5,1000.0,true,null,"é😀"],"a":{}})");
  EXPECT_EQ(ParseJson(" 7 ", "x"), 7);
}

TEST(ParseJson, SaysWhere) {
  EXPECT_EQ(ParseMessage("{\n\"a\": 1,\n\"a\": 2}"),
            "[json] x.json: line 3, byte 13: key \"a\" occurs twice");
  EXPECT_EQ(ParseMessage("[1,\n2,]").find("[json] x.json: line 2, byte 7: syntax error"), 0u)
      << ParseMessage("[1,\n2,]");
  for (const std::string text : {"",
                                 " ",
                                 "{",
                                 "[",
                                 "[1 2]",
                                 "{\"a\"}",
                                 "{\"a\":}",
                                 "nul",
                                 "01",
                                 "1e999",
                                 "NaN",
                                 "Infinity",
                                 "\"\n\"",
                                 "\"\\ud800\"",
                                 "\"\xff\"",
                                 "\"\xc0\xaf\"",
                                 "\"\xed\xa0\x80\"",
                                 "{} {}",
                                 "[1]x",
                                 "'a'",
                                 "// c\n1",
                                 "{a:1}",
                                 "\"\\x\"",
                                 "-",
                                 "+1",
                                 ".5",
                                 "\"open"}) {
    EXPECT_EQ(ParseMessage(text).find("[json] x.json: line "), 0u) << text << ParseMessage(text);
  }
  EXPECT_EQ(ParseMessage(std::string("{}\0x", 4)),
            "[json] x.json: byte 2: a zero byte is not JSON text");
}

TEST(ParseJson, MessagesAreShort) {
  EXPECT_LT(ParseMessage('"' + std::string(1 << 20, 'a')).size(), 400u);
  EXPECT_LT(ParseMessage("{\"" + std::string(1 << 20, '\x7f') + "\": 01}").size(), 1000u);
}

TEST(ParseJson, BoundsDepth) {
  const auto nested = [](int n) { return std::string(n, '[') + std::string(n, ']'); };
  EXPECT_EQ(ParseMessage(nested(64)), "");
  EXPECT_EQ(ParseMessage(nested(65)),
            "[json] x.json: line 1, byte 65: nested deeper than 64 levels");
  const auto start = std::chrono::steady_clock::now();
  EXPECT_NE(ParseMessage(std::string(100'000, '[')), "");
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  EXPECT_NE(ParseMessage(objects), "");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
  // Without a useful limit the value is still destroyed without recursion.
  ParseJson(nested(1'000'000), "x", 2'000'000);
}

TEST(ParseJson, BoundsValues) {
  EXPECT_EQ(Message([] { ParseJson("[1,2,3]", "x", 64, 4); }), "");
  EXPECT_NE(Message([] { ParseJson("[1,2,3]", "x", 64, 3); }).find("too many values"),
            std::string::npos);
}

TEST(ParseJson, ManyKeysAreLinear) {
  std::string text = "{\"k\":0";
  for (int i = 0; i < 300'000; ++i)
    text += ",\"key" + std::to_string(i) + "\":" + std::to_string(i);
  const Json json = ParseJson(text + "}", "x");
  EXPECT_EQ(json.size(), 300'001u);
  EXPECT_NE(ParseMessage(text + ",\"key7\":1}").find("\"key7\" occurs twice"), std::string::npos);
}

TEST(Getters, ReadAndRefuse) {
  const Json json = ParseJson(
      R"({"i":3,"d":0.5,"b":true,"s":"x","n":null,"l":[1,2],"big":18446744073709551615})", "c");
  EXPECT_EQ(GetInt(json, "i", "c"), 3);
  EXPECT_EQ(GetDouble(json, "i", "c"), 3.0);
  EXPECT_EQ(GetDouble(json, "d", "c", 0, 1), 0.5);
  EXPECT_TRUE(GetBool(json, "b", "c"));
  EXPECT_EQ(GetString(json, "s", "c"), "x");
  EXPECT_EQ(GetInts(json, "l", "c", 0, 2), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(GetIntOr(json, "n", "c", 7), 7);
  EXPECT_EQ(GetIntOr(json, "none", "c", 7), 7);
  EXPECT_EQ(GetIntOr(json, "i", "c", 7), 3);
  EXPECT_EQ(GetDoubleOr(json, "n", "c", 0.25), 0.25);
  EXPECT_FALSE(GetBoolOr(json, "none", "c", false));
  EXPECT_EQ(GetStringOr(json, "s", "c", "y"), "x");

  EXPECT_EQ(Message([&] { GetInt(json, "none", "c"); }), "[json] c: \"none\" is missing");
  EXPECT_EQ(Message([&] { GetInt(json, "d", "c"); }),
            "[json] c: \"d\": expected an integer, got 0.5");
  EXPECT_EQ(Message([&] { GetInt(json, "i", "c", 4, 9); }),
            "[json] c: \"i\": expected an integer in [4, 9], got 3");
  EXPECT_NE(Message([&] { GetInt(json, "big", "c"); }), "");
  EXPECT_EQ(Message([&] { GetInts(json, "l", "c", 0, 1); }),
            "[json] c: \"l\": expected an integer in [0, 1], got 2");
  EXPECT_EQ(Message([&] { GetBoolOr(json, "s", "c", true); }),
            "[json] c: \"s\": expected true or false, got \"x\"");
  EXPECT_EQ(Message([&] { GetString(json, "l", "c"); }),
            "[json] c: \"l\": expected a string, got array");
  EXPECT_EQ(Message([&] { GetInt(json["l"], "x", "c"); }),
            "[json] c: expected an object with \"x\", got array");
}

TEST(CheckKnownKeys, NamesTheNearest) {
  constexpr std::string_view kKnown[] = {"hidden_size", "num_layers", "vocab_size"};
  CheckKnownKeys(ParseJson(R"({"vocab_size":1,"hidden_size":2})", "c"), kKnown, "c");
  EXPECT_EQ(Message([&] { CheckKnownKeys(ParseJson(R"({"hiden_size":1})", "c"), kKnown, "c"); }),
            "[json] c: unknown key \"hiden_size\". Hint: did you mean \"hidden_size\"?");
  EXPECT_EQ(Message([&] { CheckKnownKeys(ParseJson(R"({"zzz":1})", "c"), kKnown, "c"); }),
            "[json] c: unknown key \"zzz\". Hint: known keys are hidden_size, num_layers, "
            "vocab_size");
}

TEST(Printable, EscapesAndCuts) {
  EXPECT_EQ(Printable("a\n\x1b[0m\xc3\xa9"), "a\\x0a\\x1b[0m\\xc3\\xa9");
  EXPECT_EQ(Printable("abcdef", 3), "abc...");
}

}  // namespace
}  // namespace detour
