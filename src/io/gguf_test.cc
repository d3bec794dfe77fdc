#include "io/gguf.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "core/error.h"
#include "core/half.h"
#include "core/rng.h"
#include "io/atomic.h"

namespace detour::io {
namespace {

namespace fs = std::filesystem;

std::string Message(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  }
  return "";
}
bool Contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::span<const std::byte> AsBytes(const std::string& text) {
  return std::as_bytes(std::span(text));
}
std::string ParseMessage(const std::string& bytes) {
  const auto start = std::chrono::steady_clock::now();
  const std::string message = Message([&] { GgufFile::Parse(AsBytes(bytes), "x"); });
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  EXPECT_TRUE(message.empty() || message.starts_with("[io.gguf] x: ")) << message;
  EXPECT_LT(message.size(), 600u);
  return message;
}

template <typename T>
std::string Raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}
std::string Str(const std::string& text) { return Raw<uint64_t>(text.size()) + text; }
std::string Key(const std::string& key, GgufKind kind, const std::string& value) {
  return Str(key) + Raw(kind) + value;
}
std::string Array(GgufKind kind, uint64_t count, const std::string& items) {
  return Raw(kind) + Raw(count) + items;
}
// `dims` as in the file: the innermost first.
std::string Tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                   uint64_t offset) {
  std::string out = Str(name) + Raw<uint32_t>(dims.size());
  for (const uint64_t dim : dims) out += Raw(dim);
  return out + Raw(type) + Raw(offset);
}
std::string File(uint64_t num_tensors, uint64_t num_keys, const std::string& entries,
                 const std::string& data = "", uint64_t alignment = 32, uint32_t version = 3) {
  std::string out = "GGUF" + Raw(version) + Raw(num_tensors) + Raw(num_keys) + entries;
  if (!data.empty()) out.resize((out.size() + alignment - 1) / alignment * alignment, '\0');
  return out + data;
}
std::string OneKey(GgufKind kind, const std::string& value) {
  return File(0, 1, Key("k", kind, value));
}
// One tensor "t" and `num_data` bytes.
std::string OneTensor(const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset,
                      size_t num_data) {
  return File(1, 0, Tensor("t", dims, type, offset), std::string(num_data, '\1'));
}

class GgufTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = testing::TempDir() + "detour_gguf_XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }
  std::string dir_;
};

TEST(GgufParse, Good) {
  for (const uint32_t version : {2, 3}) {
    const std::string bytes =
        File(3, 2,
             Key("general.alignment", GgufKind::kU32, Raw<uint32_t>(64)) +
                 Key("name", GgufKind::kString, Str("Jo")) + Tensor("b", {32, 2}, 8, 64) +
                 Tensor("a", {3}, 0, 0) + Tensor("one", {}, 0, 192),
             std::string(196, '\0'), 64, version);
    const auto file = GgufFile::Parse(AsBytes(bytes), "x");
    EXPECT_EQ(file.version(), static_cast<int>(version));
    EXPECT_EQ(file.tensors().size(), 3u);
    EXPECT_EQ(file.Get("b").shape, (std::vector<int64_t>{2, 32}));
    EXPECT_EQ(file.Get("b").bytes.size(), 68u);
    EXPECT_EQ(file.Get("one").NumElements(), 1);
    EXPECT_EQ(file.GetString("name"), "Jo");
    EXPECT_EQ(file.ReadF32("a", std::array<int64_t, 1>{3}), std::vector<float>(3));
  }
  EXPECT_EQ(ParseMessage(File(0, 0, "")), "");
  EXPECT_EQ(ParseMessage(OneTensor({0, 7}, 0, 0, 0)), "");
  EXPECT_EQ(ParseMessage(OneTensor({4}, 0, 0, 100)), "");            // bytes after the last
  EXPECT_EQ(ParseMessage(OneTensor({256}, 20, 0, 8 * 18)), "");      // IQ4_NL: known by size
  EXPECT_EQ(ParseMessage(OneTensor({1, 1, 2, 2}, 24, 32, 36)), "");  // a gap in front
}

TEST(GgufParse, RefusesHeads) {
  EXPECT_TRUE(Contains(ParseMessage(""), "expected 4 bytes at offset 0, 0 are left"));
  EXPECT_TRUE(Contains(ParseMessage("GGML" + std::string(40, '\0')), "no GGUF file"));
  EXPECT_TRUE(Contains(ParseMessage(File(0, 0, "", "", 32, 1)), "version 2 or 3, got 1"));
  EXPECT_TRUE(Contains(ParseMessage(File(0, 0, "", "", 32, 0x03000000)), "big-endian"));
  EXPECT_FALSE(Contains(ParseMessage(File(0, 0, "", "", 32, 0)), "big-endian"));
  // Counts that lie.
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  EXPECT_TRUE(Contains(ParseMessage(File(kHuge, 0, "")), "number of tensors"));
  EXPECT_TRUE(Contains(ParseMessage(File(0, kHuge, "")), "number of keys"));
  EXPECT_TRUE(Contains(ParseMessage(File(0, 1, "")), "number of keys"));
  EXPECT_TRUE(Contains(ParseMessage(File(1 << 20, 0, std::string(24 << 20, '\1'))), "at most"));
  EXPECT_TRUE(Contains(ParseMessage(File(0, 1 << 17, std::string(13 << 17, '\1'))), "at most"));
  EXPECT_NE(ParseMessage(File(0, 2, Key("k", GgufKind::kU64, Raw<uint64_t>(1)))), "");
  EXPECT_NE(ParseMessage(File(2, 0, Tensor("t", {4}, 0, 0), std::string(96, '\0'))), "");
}

TEST(GgufParse, RefusesMetadata) {
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  const auto refuse = [](const std::string& bytes, const char* part) {
    const std::string message = ParseMessage(bytes);
    EXPECT_TRUE(Contains(message, part)) << message;
  };
  const std::string u8 = Key("k", GgufKind::kU8, "\1");
  refuse(File(0, 2, u8 + u8), "x: k: the key occurs twice");
  refuse(File(0, 1, Key("", GgufKind::kU64, Raw<uint64_t>(1))), "a name of 1 to 65535 bytes");
  refuse(File(0, 1, Key(std::string(70000, 'k'), GgufKind::kU8, "1")), "got 70000");
  refuse(File(0, 1, Raw<uint64_t>(1000) + "abcdefgh"), "expected 1000 bytes");
  refuse(File(0, 1, Raw(kHuge) + "abcdefgh"), "key: expected 18446744073709551615 bytes");
  refuse(OneKey(static_cast<GgufKind>(13), std::string(8, '\0')), "value type 13 is unknown");
  refuse(OneKey(GgufKind::kBool, "\2"), "a bool of 0 or 1, got 2");
  refuse(OneKey(GgufKind::kString, Raw(kHuge)), "k: expected 18446744073709551615 bytes");
  refuse(OneKey(GgufKind::kU64, "1234"), "k: expected 8 bytes at offset 37, 4 are left");
  refuse(OneKey(GgufKind::kArray, Array(GgufKind::kU8, kHuge, "abc")), "3 are left");
  refuse(OneKey(GgufKind::kArray, Array(GgufKind::kF64, kHuge / 8 + 2, "abcdefgh")), "entries of");
  refuse(OneKey(GgufKind::kArray, Array(GgufKind::kString, 1 << 30, std::string(800, '\0'))),
         "1073741824 entries of 8 bytes or more");
  refuse(OneKey(GgufKind::kArray, Array(GgufKind::kString, 2, Str("a") + Raw(kHuge))), "bytes");
  refuse(OneKey(GgufKind::kArray, Array(static_cast<GgufKind>(99), 0, "")), "99 is unknown");
  refuse(OneKey(GgufKind::kArray, Array(GgufKind::kBool, 2, std::string("\1\7"))), "got 7");
  std::string nested = Array(GgufKind::kU8, 0, "");
  for (int depth = 2; depth <= 4; ++depth) nested = Array(GgufKind::kArray, 1, nested);
  EXPECT_EQ(ParseMessage(OneKey(GgufKind::kArray, nested)), "");
  refuse(OneKey(GgufKind::kArray, Array(GgufKind::kArray, 1, nested)), "deeper than 4");
  // Names from the file are shown, but on one line and not at any length.
  refuse(File(0, 2, Key("a\nb", GgufKind::kU8, "1") + Key("a\nb", GgufKind::kU8, "1")), "a\\x0ab");
}

TEST(GgufParse, RefusesTensors) {
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  const auto refuse = [](const std::string& bytes, const char* part) {
    const std::string message = ParseMessage(bytes);
    EXPECT_TRUE(Contains(message, part)) << message;
  };
  refuse(OneTensor({1, 1, 1, 1, 1}, 0, 0, 32), "x: t: expected at most 4 dims, got 5");
  refuse(OneTensor({5}, 0, 0, 16), "F32 [5] takes 20 bytes at 0, the file has 16");
  refuse(OneTensor({4}, 0, 32, 16), "takes 16 bytes at 32");
  refuse(OneTensor({4}, 0, kHuge - 31, 32), "takes 16 bytes at 18446744073709551584");
  refuse(OneTensor({4}, 0, 4, 32), "offset 4 is no multiple of the alignment, 32");
  refuse(OneTensor({kHuge}, 0, 0, 32), "a dim of 18446744073709551615");
  refuse(OneTensor({uint64_t{1} << 62}, 0, 0, 32), "is too large");
  refuse(OneTensor({uint64_t{1} << 32, uint64_t{1} << 32}, 0, 0, 32), "is too large");
  refuse(OneTensor({uint64_t{1} << 32, uint64_t{1} << 32, 0}, 0, 0, 32), "is too large");
  refuse(OneTensor({0, uint64_t{1} << 32, uint64_t{1} << 32}, 0, 0, 32), "is too large");
  refuse(OneTensor({uint64_t{1} << 62}, 11, 0, 32), "takes");  // Q3_K: 2^62 elements fit int64
  refuse(OneTensor({31}, 8, 0, 64), "Q8_0 [31]: expected rows of whole blocks of 32");
  refuse(OneTensor({16, 2}, 2, 0, 64), "Q4_0 [2, 16]: expected rows");
  refuse(OneTensor({128, 2}, 12, 0, 200), "whole blocks of 256");
  refuse(OneTensor({32}, 4, 0, 64), "tensor type 4 is unknown");
  refuse(OneTensor({32}, 0xffffffff, 0, 64), "is unknown");
  const auto two = [&](uint64_t a, uint64_t b, const char* name = "b") {
    return ParseMessage(
        File(2, 0, Tensor("a", {9}, 0, a) + Tensor(name, {9}, 0, b), std::string(128, '\0')));
  };
  EXPECT_EQ(two(64, 0), "");
  EXPECT_TRUE(Contains(two(0, 32), "x: b: offset 32 overlaps another tensor"));
  EXPECT_TRUE(Contains(two(0, 0), "overlaps"));
  EXPECT_TRUE(Contains(two(0, 64, "a"), "a: the tensor occurs twice"));
  refuse(File(1, 0, Tensor("", {4}, 0, 0), std::string(16, '\0')), "a name of");
}

TEST(GgufParse, RefusesAlignments) {
  const auto with = [](GgufKind kind, const std::string& value, uint64_t alignment = 32) {
    return ParseMessage(File(1, 1, Key("general.alignment", kind, value) + Tensor("t", {4}, 0, 0),
                             std::string(16, '\0'), alignment));
  };
  EXPECT_EQ(with(GgufKind::kU32, Raw<uint32_t>(1), 1), "");
  EXPECT_EQ(with(GgufKind::kU32, Raw<uint32_t>(4096), 4096), "");
  EXPECT_TRUE(Contains(with(GgufKind::kU32, Raw<uint32_t>(0)), "a power of two as u32, got 0"));
  EXPECT_TRUE(Contains(with(GgufKind::kU32, Raw<uint32_t>(48)), "got 48"));
  EXPECT_TRUE(Contains(with(GgufKind::kU32, Raw<uint32_t>(1u << 31)), "the file has 0 bytes"));
  EXPECT_TRUE(Contains(with(GgufKind::kU64, Raw<uint64_t>(32)), "got u64"));
  EXPECT_TRUE(Contains(with(GgufKind::kString, Str("32")), "got string"));
}

TEST(GgufParse, AnyPrefixIsRefused) {
  const std::string good =
      File(2, 3,
           Key("a", GgufKind::kString, Str("text")) + Key("b", GgufKind::kF64, Raw(0.5)) +
               Key("c", GgufKind::kArray, Array(GgufKind::kString, 2, Str("p") + Str("q"))) +
               Tensor("t", {2, 2}, 0, 0) + Tensor("u", {32}, 2, 32),
           std::string(32 + 18, '\1'));
  EXPECT_EQ(ParseMessage(good), "");
  for (size_t n = 0; n < good.size(); ++n) EXPECT_NE(ParseMessage(good.substr(0, n)), "") << n;
}

// As much work as a head can ask for: ParseMessage takes the time.
TEST(GgufParse, LargeHeadsInTime) {
  constexpr uint64_t kCount = 4'000'000;
  const std::string strings(8 * kCount, '\0');
  EXPECT_EQ(ParseMessage(OneKey(GgufKind::kArray, Array(GgufKind::kString, kCount, strings))), "");
  std::string tensors;
  for (int i = 0; i < 1 << 18; ++i) tensors += Tensor(std::to_string(i), {0}, 0, 0);
  EXPECT_EQ(ParseMessage(File(1 << 18, 0, tensors)), "");
}

TEST(GgufValues, TypedAndChecked) {
  using Limits = std::numeric_limits<int64_t>;
  const std::string items = Str("p") + Str("");
  const std::string inner = Array(GgufKind::kU16, 2, Raw<uint16_t>(1) + Raw<uint16_t>(2)) +
                            Array(GgufKind::kString, 1, Str("z"));
  const std::vector<std::string> keys = {
      Key("u8", GgufKind::kU8, "\xff"),
      Key("i8", GgufKind::kI8, "\xff"),
      Key("u16", GgufKind::kU16, "\xff\xff"),
      Key("i16", GgufKind::kI16, "\xff\xff"),
      Key("u32", GgufKind::kU32, Raw<uint32_t>(0xffffffff)),
      Key("i32", GgufKind::kI32, Raw<int32_t>(-7)),
      Key("u64", GgufKind::kU64, Raw<uint64_t>(Limits::max())),
      Key("large", GgufKind::kU64, Raw<uint64_t>(uint64_t{1} << 63)),
      Key("i64", GgufKind::kI64, Raw<int64_t>(Limits::min())),
      Key("f32", GgufKind::kF32, Raw(1e-5f)),
      Key("f64", GgufKind::kF64, Raw(1e-5)),
      Key("yes", GgufKind::kBool, "\1"),
      Key("text", GgufKind::kString, Str(std::string("a\0\xff", 3))),
      Key("strings", GgufKind::kArray, Array(GgufKind::kString, 2, items)),
      Key("ints", GgufKind::kArray, Array(GgufKind::kI8, 2, "\x05\xfb")),
      Key("floats", GgufKind::kArray, Array(GgufKind::kF32, 1, Raw(0.25f))),
      Key("bools", GgufKind::kArray, Array(GgufKind::kBool, 2, std::string("\1\0", 2))),
      Key("none", GgufKind::kArray, Array(GgufKind::kString, 0, "")),
      Key("nested", GgufKind::kArray, Array(GgufKind::kArray, 2, inner)),
  };
  std::string entries;
  for (const std::string& key : keys) entries += key;
  const std::string bytes = File(0, keys.size(), entries);
  const auto file = GgufFile::Parse(AsBytes(bytes), "x");
  EXPECT_EQ(file.metadata().size(), keys.size());
  EXPECT_EQ(file.GetInt("u8"), 255);
  EXPECT_EQ(file.GetInt("i8"), -1);
  EXPECT_EQ(file.GetInt("u16"), 65535);
  EXPECT_EQ(file.GetInt("i16"), -1);
  EXPECT_EQ(file.GetInt("u32"), 0xffffffff);
  EXPECT_EQ(file.GetInt("i32"), -7);
  EXPECT_EQ(file.GetInt("u64"), Limits::max());
  EXPECT_EQ(file.GetInt("i64"), Limits::min());
  EXPECT_EQ(file.GetDouble("f32"), 1e-5f);
  EXPECT_EQ(file.GetDouble("f64"), 1e-5);
  EXPECT_EQ(file.GetDouble("i32"), -7);
  EXPECT_TRUE(file.GetBool("yes"));
  EXPECT_EQ(file.GetString("text"), std::string("a\0\xff", 3));
  EXPECT_EQ(file.GetStrings("strings"), (std::vector<std::string>{"p", ""}));
  EXPECT_EQ(file.GetInts("ints"), (std::vector<int64_t>{5, -5}));
  EXPECT_EQ(file.GetDoubles("floats"), std::vector<double>{0.25});
  EXPECT_EQ(file.GetDoubles("ints"), (std::vector<double>{5, -5}));
  EXPECT_EQ(file.GetBools("bools"), (std::vector<bool>{true, false}));
  EXPECT_TRUE(file.GetStrings("none").empty());
  EXPECT_EQ(file.GetIntOr("absent", 3), 3);
  EXPECT_EQ(file.GetIntOr("i32", 3), -7);
  EXPECT_EQ(file.GetStringOr("absent", "s"), "s");
  EXPECT_EQ(file.GetDoubleOr("absent", 2.5), 2.5);
  EXPECT_TRUE(file.GetBoolOr("absent", true));
  std::vector<int64_t> sizes;
  file.metadata().find("nested")->second.ForEach(
      [&](const GgufValue& item) { sizes.push_back(item.num_items()); });
  EXPECT_EQ(sizes, (std::vector<int64_t>{2, 1}));

  const auto fails = [&](const std::function<void()>& run) { return Message(run).substr(13); };
  EXPECT_EQ(fails([&] { file.GetInt("absent"); }), "key absent is missing");
  EXPECT_EQ(fails([&] { file.GetInt("f32"); }), "f32: expected an integer, got f32");
  EXPECT_EQ(fails([&] { file.GetInt("yes"); }), "yes: expected an integer, got bool");
  EXPECT_EQ(fails([&] { file.GetInt("large"); }), "large: expected an integer, got u64");
  EXPECT_EQ(fails([&] { file.GetInt("i32", 0, 9); }), "i32: expected 0 to 9, got -7");
  EXPECT_EQ(fails([&] { file.GetIntOr("i32", 1, 0, 9); }), "i32: expected 0 to 9, got -7");
  EXPECT_EQ(fails([&] { file.GetDouble("text"); }), "text: expected a number, got string");
  EXPECT_EQ(fails([&] { file.GetBool("u8"); }), "u8: expected a bool, got u8");
  EXPECT_EQ(fails([&] { file.GetString("strings"); }), "strings: expected a string, got array");
  EXPECT_EQ(fails([&] { file.GetStrings("text"); }),
            "text: expected an array of at most 4194304 elements, got string");
  EXPECT_EQ(fails([&] { file.GetStrings("ints"); }), "ints: expected an array of strings, got i8");
  EXPECT_EQ(fails([&] { file.GetInts("nested"); }),
            "nested: expected an array of integers, got array");
  const std::string many =
      OneKey(GgufKind::kArray, Array(GgufKind::kU8, 5 << 20, std::string(5 << 20, '\0')));
  EXPECT_TRUE(Contains(Message([&] { GgufFile::Parse(AsBytes(many), "x").GetInts("k"); }),
                       "at most 4194304 elements, got 5242880"));
}

// Blocks whose every field is known, worked out by hand; gguf_oracle_test.cc has the random ones.
TEST(GgufQuants, BlocksByHand) {
  const auto decode = [](GgufType type, const std::string& block) {
    const GgufTypeInfo& info = GgufTypeOf(type);
    EXPECT_EQ(block.size(), static_cast<size_t>(info.block_bytes));
    std::vector<float> out(info.block_size);
    DequantizeGguf(AsBytes(block), type, out);
    return out;
  };
  const std::string half = Raw<uint16_t>(0x3800), two = Raw<uint16_t>(0x4000);  // 0.5, 2
  const auto q4_0 = decode(GgufType::kQ4_0, half + std::string(16, '\x1f'));
  EXPECT_EQ(q4_0[0], 0.5f * 7);
  EXPECT_EQ(q4_0[16], 0.5f * -7);
  const auto q4_1 = decode(GgufType::kQ4_1, half + two + std::string(16, '\x1f'));
  EXPECT_EQ(q4_1[15], 0.5f * 15 + 2);
  EXPECT_EQ(q4_1[31], 0.5f * 1 + 2);
  const auto q5_0 = decode(GgufType::kQ5_0, half + Raw<uint32_t>(1u << 17) + std::string(16, '\0'));
  EXPECT_EQ(q5_0[0], -8);
  EXPECT_EQ(q5_0[17], 0);
  const auto q8_0 = decode(GgufType::kQ8_0, half + std::string(31, '\x02') + "\x80");
  EXPECT_EQ(q8_0[0], 1);
  EXPECT_EQ(q8_0[31], -64);
  // Scale 3 and minimum 1 in each sub-block; element 32·s of the first half has the quant s.
  const auto q2_k =
      decode(GgufType::kQ2_K, std::string(16, '\x13') + std::string(64, '\xe4') + half + two);
  for (int i = 0; i < 256; ++i) ASSERT_EQ(q2_k[i], 1.5f * (i / 32 % 4) - 2) << i;
}

TEST(GgufQuants, Q8RoundsAndRefuses) {
  std::vector<float> values(32);
  for (int i = 0; i < 32; ++i) values[i] = static_cast<float>(i) + 0.5f;
  values[31] = -127;  // scale 1: halves go away from zero
  std::vector<std::byte> bytes;
  ASSERT_TRUE(QuantizeGguf(values, GgufType::kQ8_0, &bytes));
  std::vector<float> back(32);
  DequantizeGguf(bytes, GgufType::kQ8_0, back);
  for (int i = 0; i < 31; ++i) EXPECT_EQ(back[i], static_cast<float>(i + 1));
  EXPECT_EQ(back[31], -127);

  const auto with = [&](float value, GgufType type) {
    std::vector<float> v(32);
    v[5] = value;
    return QuantizeGguf(v, type, &bytes);
  };
  EXPECT_TRUE(with(0, GgufType::kQ8_0));
  EXPECT_TRUE(with(1e-40f, GgufType::kQ8_0));
  EXPECT_TRUE(with(127 * 65504.0f, GgufType::kQ8_0));
  EXPECT_FALSE(with(127 * 65536.0f, GgufType::kQ8_0));
  EXPECT_FALSE(with(INFINITY, GgufType::kQ8_0));
  EXPECT_FALSE(with(NAN, GgufType::kQ8_0));
  EXPECT_TRUE(with(65504, GgufType::kF16));
  EXPECT_TRUE(with(-INFINITY, GgufType::kF16));
  EXPECT_FALSE(with(-65520, GgufType::kF16));
  EXPECT_THROW(with(1, GgufType::kQ4_0), std::logic_error);
  EXPECT_THROW(QuantizeGguf(std::vector<float>(31), GgufType::kQ8_0, &bytes), std::logic_error);
}

TEST_F(GgufTest, OpenRefuses) {
  WriteFile(dir_ + "/empty", "");
  mkfifo((dir_ + "/fifo").c_str(), 0600);
  const auto open = [&](const std::string& name) {
    const std::string message = Message([&] { GgufFile::Open(dir_ + "/" + name); });
    EXPECT_TRUE(message.starts_with("[io.gguf] ")) << message;
    return message;
  };
  EXPECT_TRUE(Contains(open("empty"), "expected 4 bytes"));
  EXPECT_TRUE(Contains(open("fifo"), "got a pipe"));
  EXPECT_TRUE(Contains(open("none"), "No such file"));
  EXPECT_TRUE(Contains(open("."), "got a directory"));
  // 64 GiB of nothing, mostly a hole: the head's limit, not the size, bounds the work.
  const std::string huge = dir_ + "/huge";
  WriteFile(huge, OneKey(GgufKind::kArray, Array(GgufKind::kString, uint64_t{1} << 23, "")));
  fs::resize_file(huge, uint64_t{1} << 36);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(Message([&] { GgufFile::Open(huge); }), "");
  WriteFile(huge, OneKey(GgufKind::kString, Raw<uint64_t>(uint64_t{1} << 30)));
  fs::resize_file(huge, uint64_t{1} << 36);
  EXPECT_TRUE(Contains(open("huge"), "of the 128 MiB that a head may have"));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

// A tensor of values that all three types hold to their precision.
GgufTensorToWrite FromVector(const std::string& name, GgufType type, std::vector<int64_t> shape,
                             const std::vector<float>& values) {
  return {name, type, std::move(shape), [&values](int64_t begin, std::span<float> out) {
            std::copy_n(values.begin() + begin, out.size(), out.begin());
          }};
}

TEST_F(GgufTest, WritesAndReads) {
  std::vector<float> values(1500 * 320);  // more than one chunk
  const Rng rng(1, RngPurpose::kTest);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(rng.Normal(i));
  const std::string path = dir_ + "/m.gguf";
  const std::vector<std::pair<std::string, GgufData>> metadata = {
      {"general.architecture", std::string("llama")},
      {"n", uint32_t{7}},
      {"eps", 1e-5f},
      {"yes", true},
      {"tokens", std::vector<std::string>{"a", "", "ä"}},
      {"types", std::vector<int32_t>{1, -3}}};
  WriteGguf(path, metadata,
            {FromVector("f32", GgufType::kF32, {1500, 320}, values),
             FromVector("odd", GgufType::kF16, {3}, values),
             FromVector("none", GgufType::kF32, {0, 5}, values),
             FromVector("q8", GgufType::kQ8_0, {2, 750, 320}, values),
             FromVector("f16", GgufType::kF16, {1500, 320}, values)});
  EXPECT_EQ(fs::file_size(path) % 32, 0u);
  const auto file = GgufFile::Open(path);
  EXPECT_EQ(file.version(), 3);
  EXPECT_EQ(file.metadata().size(), metadata.size());
  EXPECT_EQ(file.GetString("general.architecture"), "llama");
  EXPECT_EQ(file.metadata().find("n")->second.kind(), GgufKind::kU32);
  EXPECT_EQ(file.GetDouble("eps"), 1e-5f);
  EXPECT_EQ(file.GetStrings("tokens"), (std::vector<std::string>{"a", "", "ä"}));
  EXPECT_EQ(file.GetInts("types"), (std::vector<int64_t>{1, -3}));
  EXPECT_EQ(file.tensors().size(), 5u);
  const auto* const mapped = file.Get("f32").bytes.data();
  for (const auto& [name, tensor] : file.tensors()) {
    EXPECT_EQ((tensor.bytes.data() - mapped) % 32, 0) << name;
  }
  EXPECT_EQ(reinterpret_cast<uintptr_t>(mapped) % 32, 0u);

  EXPECT_EQ(file.ReadF32("f32", std::array<int64_t, 2>{1500, 320}), values);
  const std::vector<float> f16 = file.ReadF32("f16"), q8 = file.ReadF32("q8");
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = F32ToF16Bits(std::bit_cast<uint32_t>(values[i]));
    ASSERT_EQ(f16[i], std::bit_cast<float>(F16ToF32Bits(half))) << i;
    // Half a step of at most 6 / 127, and the scale's rounding.
    ASSERT_NEAR(q8[i], values[i], 6.0 / 127 * 0.51) << i;
  }
  const std::span<const float> view = file.ViewF32("f32");
  EXPECT_TRUE(std::equal(view.begin(), view.end(), values.begin(), values.end()));
  EXPECT_TRUE(file.ViewF32("f16").empty());
  // By rows, at any place.
  std::vector<float> rows(7 * 320);
  file.ReadRowsF32Into("q8", 1493, rows);
  EXPECT_TRUE(std::equal(rows.begin(), rows.end(), q8.end() - 7 * 320));
  file.ReadF32Into("odd", std::span(rows).first(3));
  EXPECT_EQ(rows[2], f16[2]);
  file.ReadRowsF32Into("q8", 1500, {});

  const auto prefix = "[io.gguf] " + path + ": ";
  EXPECT_EQ(Message([&] { file.ReadRowsF32Into("q8", 1494, rows); }),
            prefix + "q8: expected 2240 elements from row 1494 on, got Q8_0 [2, 750, 320]");
  EXPECT_NE(Message([&] { file.ReadRowsF32Into("q8", -1, rows); }), "");
  EXPECT_NE(Message([&] { file.ReadRowsF32Into("q8", 0, std::span(rows).first(321)); }), "");
  EXPECT_EQ(Message([&] {
              file.ReadF32("f16", std::array<int64_t, 2>{320, 1500});
            }),
            prefix + "f16: expected shape [320, 1500], got F16 [1500, 320]");
  EXPECT_EQ(Message([&] { file.ReadF32Into("odd", rows); }),
            prefix + "odd: expected 2240 elements, got F16 [3]");
  EXPECT_EQ(Message([&] { file.Get("nothing"); }), prefix + "nothing: no such tensor");
  const std::string iq = OneTensor({32}, 20, 0, 18);
  EXPECT_TRUE(Contains(Message([&] { GgufFile::Parse(AsBytes(iq), "x").ReadF32("t"); }),
                       "x: t: IQ4_NL [32]: this type is not supported. Hint: "));
}

TEST_F(GgufTest, WriterRefusesAndIsAtomic) {
  const std::string path = dir_ + "/m.gguf";
  std::vector<float> values(64, 1);
  const auto one = [&](GgufType type, const std::string& name = "t") {
    return std::vector<GgufTensorToWrite>{FromVector(name, type, {2, 32}, values)};
  };
  WriteGguf(path, {}, one(GgufType::kQ8_0));
  const std::string before = ReadFile(path);
  values[40] = INFINITY;
  EXPECT_EQ(Message([&] { WriteGguf(path, {}, one(GgufType::kQ8_0)); }),
            "[io.gguf] " + path +
                ": t: its values are too large or not finite for Q8_0. Hint: write F32");
  EXPECT_EQ(ReadFile(path), before);
  setenv("DETOUR_FAIL_POINT", "write:2", 1);
  EXPECT_TRUE(Contains(Message([&] { WriteGguf(path, {}, one(GgufType::kF32)); }), "[io.write]"));
  unsetenv("DETOUR_FAIL_POINT");
  EXPECT_EQ(ReadFile(path), before);
  EXPECT_EQ(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()), 1);

  const auto data = [](const char* key) {
    return std::pair<std::string, GgufData>(key, uint32_t{1});
  };
  EXPECT_THROW(WriteGguf(path, {data("a"), data("a")}, {}), std::logic_error);
  EXPECT_THROW(WriteGguf(path, {data("general.alignment")}, {}), std::logic_error);
  EXPECT_THROW(WriteGguf(path, {}, one(GgufType::kQ4_0)), std::logic_error);
  EXPECT_THROW(WriteGguf(path, {}, one(GgufType::kF32, std::string(64, 't'))), std::logic_error);
  EXPECT_THROW(WriteGguf(path, {}, {FromVector("t", GgufType::kQ8_0, {2, 33}, values)}),
               std::logic_error);
  EXPECT_EQ(ReadFile(path), before);
}

}  // namespace
}  // namespace detour::io
