#include "io/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <span>

#include "core/error.h"
#include "io/atomic.h"
#include "io/sharded.h"

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

std::string Bytes(const std::string& header, size_t num_data, int64_t length = -1) {
  const uint64_t n = length < 0 ? header.size() : length;
  return std::string(reinterpret_cast<const char*>(&n), 8) + header + std::string(num_data, '\1');
}
std::string ParseMessage(const std::string& bytes) {
  const std::string message =
      Message([&] { SafetensorsFile::Parse(std::as_bytes(std::span(bytes)), "x"); });
  EXPECT_TRUE(message.empty() || message.starts_with("[io.safetensors] x: ")) << message;
  EXPECT_LT(message.size(), 600u);
  return message;
}
std::string Entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}
// Of a file with one F32 tensor "t" and 16 bytes of data.
std::string OneMessage(const std::string& shape, const std::string& offsets,
                       const std::string& dtype = "F32") {
  return ParseMessage(Bytes("{" + Entry("t", dtype, shape, offsets) + "}", 16));
}

class SafetensorsTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = testing::TempDir() + "detour_safetensors_XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { fs::remove_all(dir_); }

  // One F32 tensor of shape [2] per name, with the values {value, -value}.
  void Write(const std::string& file, const std::vector<std::string>& names, float value = 1) {
    const float values[] = {value, -value};
    std::vector<TensorToWrite> tensors;
    for (const std::string& name : names) {
      tensors.push_back({name, DType::kF32, {2}, std::as_bytes(std::span(values))});
    }
    WriteSafetensors(dir_ + "/" + file, tensors);
  }

  std::string dir_;
};

TEST(SafetensorsParse, Good) {
  EXPECT_EQ(ParseMessage(Bytes("{}", 0)), "");
  EXPECT_EQ(ParseMessage(Bytes("{\"__metadata__\":{\"a\":\"b\"}}   ", 0)), "");
  EXPECT_EQ(OneMessage("[2,2]", "[0,16]"), "");
  EXPECT_EQ(OneMessage("[]", "[0,16]", "F64").empty(), false);
  const std::string two =
      Bytes("{" + Entry("b", "I8", "[2]", "[1,3]") + "," + Entry("a", "U8", "[1]", "[0,1]") + "," +
                Entry("none", "F32", "[0,5]", "[1,1]") + "}",
            3);
  const auto file = SafetensorsFile::Parse(std::as_bytes(std::span(two)), "x");
  EXPECT_EQ(file.tensors().size(), 3u);
  EXPECT_EQ(file.Get("b").bytes.size(), 2u);
  EXPECT_EQ(file.Get("none").NumElements(), 0);
  EXPECT_TRUE(file.ReadF32("none").empty());
}

TEST(SafetensorsParse, Refuses) {
  for (const std::string& bytes :
       {std::string(), std::string("1234567"), Bytes("", 0), Bytes("{}", 0, 3), Bytes("{}", 0, 1),
        Bytes("[]", 0), Bytes("{}", 1), Bytes("7", 0), std::string(8, '\xff'),
        Bytes("{}", 0, std::numeric_limits<int64_t>::max()),
        Bytes("{\"__metadata__\":{\"a\":1}}", 0), Bytes("{\"__metadata__\":[]}", 0),
        Bytes("{\"t\":7}", 0), Bytes("{\"t\":{}}", 0), Bytes(std::string(100'000, '['), 0)}) {
    EXPECT_NE(ParseMessage(bytes), "") << bytes.substr(0, 50);
  }
  for (const char* shape : {"[4.0]", "[-4]", "[\"4\"]", "4", "null", "[[4]]", "[3]", "[5]", "[]",
                            "[4294967296,4294967296]", "[9223372036854775807]",
                            "[9223372036854775808]", "[1e400]", "[4611686018427387904,4,0]"}) {
    EXPECT_NE(OneMessage(shape, "[0,16]"), "") << shape;
  }
  for (const char* offsets : {"[0]", "[0,16,16]", "[]", "[16,0]", "[0,15]", "[1,17]", "[-16,0]",
                              "[0,1.6e1]", "[0,18446744073709551615]", "{}", "null"}) {
    EXPECT_NE(OneMessage("[4]", offsets), "") << offsets;
  }
  EXPECT_TRUE(Contains(OneMessage("[4]", "[0,16]", "F128"), "x: t: dtype F128 is not supported"));
  const auto two = [](const std::string& a, const std::string& b, size_t num_data) {
    return ParseMessage(
        Bytes("{" + Entry("a", "U8", "[2]", a) + "," + Entry("b", "U8", "[2]", b) + "}", num_data));
  };
  EXPECT_EQ(two("[2,4]", "[0,2]", 4), "");
  EXPECT_TRUE(Contains(two("[0,2]", "[1,3]", 3), "overlaps"));
  EXPECT_TRUE(Contains(two("[0,2]", "[0,2]", 2), "overlaps"));
  EXPECT_TRUE(Contains(two("[0,2]", "[3,5]", 5), "a hole"));
  EXPECT_TRUE(Contains(two("[1,3]", "[3,5]", 5), "a hole"));
  EXPECT_TRUE(Contains(two("[0,2]", "[2,4]", 5), "the tensors have 4 bytes, the file has 5"));
  const std::string entry = Entry("a", "U8", "[0]", "[0,0]");
  EXPECT_TRUE(Contains(ParseMessage(Bytes("{" + entry + "," + entry + "}", 0)), "occurs twice"));
  EXPECT_TRUE(Contains(ParseMessage(Bytes("{\"a\":{\"shapes\":1}}", 0)), "did you mean \"shape\""));
}

TEST(SafetensorsParse, AnyPrefixIsRefusedInTime) {
  const std::string good = Bytes("{" + Entry("t", "F32", "[2,2]", "[0,16]") + "}", 16);
  for (size_t n = 0; n < good.size(); ++n) EXPECT_NE(ParseMessage(good.substr(0, n)), "") << n;
  std::string large = "{\"a\":{\"shape\":[0";
  while (large.size() < 30'000'000) large += ",0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0";
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(Contains(ParseMessage(Bytes(large, 0)), "too many values"));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST_F(SafetensorsTest, OpenRefuses) {
  WriteFile(dir_ + "/empty", "");
  mkfifo((dir_ + "/fifo").c_str(), 0600);
  const auto open = [&](const std::string& name) {
    const std::string message = Message([&] { SafetensorsFile::Open(dir_ + "/" + name); });
    EXPECT_TRUE(message.starts_with("[io.safetensors] ")) << message;
    return message;
  };
  EXPECT_TRUE(Contains(open("empty"), "expected at least 8 bytes, got 0"));
  EXPECT_TRUE(Contains(open("fifo"), "got a pipe"));
  EXPECT_TRUE(Contains(open("none"), "No such file"));
  EXPECT_TRUE(Contains(open("."), "got a directory"));
}

TEST_F(SafetensorsTest, WritesAndReads) {
  const std::vector<int64_t> i64 = {1, -2, 3};
  const std::vector<int64_t> i64_large = {1, int64_t{1} << 31};
  const std::vector<int32_t> i32 = {4, -5};
  const std::vector<float> f32 = {0.5f, -1, 2, 3};
  const auto bytes = [](const auto& v) { return std::as_bytes(std::span(v)); };
  const std::string path = dir_ + "/f";
  const auto bf16 = ConvertF32(f32, DType::kBF16);
  WriteSafetensors(path,
                   {{"flag", DType::kBool, {1}, bytes(i64).first(1)},
                    {"i64", DType::kI64, {3}, bytes(i64)},
                    {"f32", DType::kF32, {2, 2}, bytes(f32)},
                    {"i32", DType::kI32, {2}, bytes(i32)},
                    {"large", DType::kI64, {2}, bytes(i64_large)},
                    {"bf16", DType::kBF16, {4, 1}, bf16},
                    {"scalar", DType::kF32, {}, bytes(f32).first(4)},
                    {"none", DType::kF32, {3, 0}, {}}},
                   {{"step", "7"}});
  const auto file = SafetensorsFile::Open(path);
  EXPECT_EQ(file.path(), path);
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"step", "7"}}));
  EXPECT_EQ(file.tensors().size(), 8u);
  const auto base = reinterpret_cast<uintptr_t>(file.Get("i64").bytes.data());
  for (const auto& [name, info] : file.tensors()) {
    if (info.bytes.empty()) continue;
    EXPECT_EQ((reinterpret_cast<uintptr_t>(info.bytes.data()) - base) % DTypeBytes(info.dtype), 0u);
  }
  EXPECT_EQ(base % 8, 0u);
  EXPECT_EQ(file.ReadF32("f32"), f32);
  EXPECT_EQ(file.ReadF32("f32", std::array<int64_t, 2>{2, 2}), f32);
  const std::span<const float> view = file.ViewF32("f32");
  EXPECT_TRUE(std::equal(view.begin(), view.end(), f32.begin(), f32.end()));
  EXPECT_EQ(view.data(), static_cast<const void*>(file.Get("f32").bytes.data()));
  EXPECT_TRUE(file.ViewF32("bf16").empty());
  EXPECT_EQ(file.ReadF32("bf16"), f32);
  EXPECT_EQ(file.ReadF32("scalar"), std::vector<float>{0.5f});
  EXPECT_EQ(file.ReadI32("i64"), (std::vector<int32_t>{1, -2, 3}));
  EXPECT_EQ(file.ReadI32("i32"), i32);
  const auto prefix = "[io.safetensors] " + path + ": ";
  EXPECT_EQ(Message([&] { file.ReadF32("f32", std::array<int64_t, 1>{4}); }),
            prefix + "f32: expected shape F32 [4], got F32 [2, 2]");
  EXPECT_EQ(Message([&] { file.ReadF32("i32"); }),
            prefix + "i32: expected F32, F16, BF16 or F64, got I32 [2]");
  EXPECT_EQ(Message([&] { file.ReadI32("large"); }),
            prefix + "large: expected 32-bit integers, got 2147483648");
  EXPECT_EQ(Message([&] { file.ReadI32("f32"); }),
            prefix + "f32: expected I32 or I64, got F32 [2, 2]");
  EXPECT_EQ(Message([&] { file.Get("nothing"); }), prefix + "nothing: no such tensor");
  std::vector<float> out(3);
  EXPECT_EQ(Message([&] { file.ReadF32Into("f32", out); }),
            prefix + "f32: expected 3 elements, got F32 [2, 2]");

  EXPECT_THROW(WriteSafetensors(path, {{"a", DType::kF32, {3}, bytes(f32)}}), std::logic_error);
  EXPECT_THROW(WriteSafetensors(path, {{"a", DType::kF32, {0}, {}}, {"a", DType::kF32, {0}, {}}}),
               std::logic_error);
  EXPECT_TRUE(Contains(Message([&] { WriteSafetensors("/dev/full", {}); }),
                       "[io.write] /dev/full: cannot write: No space left on device"));
}

TEST(Convert, AllHalfPatternsExactAndBack) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    std::vector<uint16_t> patterns(65536);
    for (int i = 0; i < 65536; ++i) patterns[i] = static_cast<uint16_t>(i);
    std::vector<float> values(65536);
    ConvertToF32(std::as_bytes(std::span(patterns)), dtype, values);
    const bool half = dtype == DType::kF16;
    const int mantissa_bits = half ? 10 : 7, bias = half ? 15 : 127;
    for (int i = 0; i < 65536; ++i) {
      // By the definition of the format.
      const int exponent = (i & 0x7fff) >> mantissa_bits;
      const int mantissa = i & ((1 << mantissa_bits) - 1);
      EXPECT_EQ(std::signbit(values[i]), i >= 0x8000);
      if (exponent == 2 * bias + 1) {
        EXPECT_TRUE(mantissa == 0 ? std::isinf(values[i]) : std::isnan(values[i])) << i;
      } else {
        const int significand = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
        ASSERT_EQ(std::fabs(values[i]),
                  std::ldexp(significand, std::max(exponent, 1) - bias - mantissa_bits))
            << i;
      }
    }
    const auto back = ConvertF32(values, dtype);
    EXPECT_EQ(std::memcmp(back.data(), patterns.data(), back.size()), 0);
  }
  EXPECT_THROW(ConvertF32({}, DType::kI8), std::logic_error);
}

TEST_F(SafetensorsTest, ShardedReadsBothForms) {
  Write("model.safetensors", {"a", "b"}, 3);
  EXPECT_EQ(ShardedTensors::Open(dir_).Names(), (std::vector<std::string>{"a", "b"}));
  fs::remove(dir_ + "/model.safetensors");
  EXPECT_TRUE(Contains(Message([&] { ShardedTensors::Open(dir_); }), "expected model.safetensors"));
  EXPECT_TRUE(
      Contains(Message([&] { ShardedTensors::Open(dir_ + "/no"); }), "expected model.safetensors"));

  Write("s1", {"a", "b"}, 1);
  Write("s2", {"c"}, 2);
  const auto index = [&](const std::string& weight_map) {
    WriteFile(dir_ + "/model.safetensors.index.json",
              R"({"metadata":{"total_size":24},"weight_map":)" + weight_map + "}");
    return Message([&] { ShardedTensors::Open(dir_); });
  };
  EXPECT_EQ(index(R"({"a":"s1","c":"s2","b":"s1"})"), "");
  const auto tensors = ShardedTensors::Open(dir_);
  EXPECT_EQ(tensors.files().size(), 2u);
  EXPECT_TRUE(tensors.Has("c"));
  EXPECT_FALSE(tensors.Has("d"));
  EXPECT_EQ(tensors.ReadF32("c"), (std::vector<float>{2, -2}));
  EXPECT_EQ(tensors.FileOf("b").path(), dir_ + "/s1");
  EXPECT_EQ(Message([&] { tensors.Get("d"); }),
            "[io.safetensors] " + dir_ + ": tensor \"d\" is missing");

  EXPECT_TRUE(Contains(index(R"({"a":"s1","b":"s1","c":"s2","d":"s2"})"), "\"d\" is not in s2"));
  EXPECT_TRUE(Contains(index(R"({"a":"s1","c":"s2"})"), "\"b\" is in s1, but the index does not"));
  EXPECT_TRUE(Contains(index(R"({"a":"s1","b":"s1","c":"s3"})"), "s3: cannot open: No such file"));
  Write("s2", {"b", "c"}, 2);
  EXPECT_TRUE(
      Contains(index(R"({"a":"s1","b":"s1","c":"s2"})"), "\"b\" is in s2, but the index says"));
  for (const char* shard : {"\"../s1\"", "\"/etc/passwd\"", "\"a/b\"", "\"\"", "\".\"", "\"..\"",
                            "7", "null", "\"s\\u0000\""}) {
    EXPECT_TRUE(Contains(index(R"({"a":)" + std::string(shard) + "}"), "in the same directory"))
        << shard;
  }
  EXPECT_TRUE(Contains(index("[]"), "weight_map"));
  EXPECT_NE(index("{"), "");
}

}  // namespace
}  // namespace detour::io
