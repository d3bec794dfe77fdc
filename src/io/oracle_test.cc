// Against the reference implementation of safetensors and the casts of torch: see
// tests/io_oracle.py.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "core/json.h"
#include "io/atomic.h"
#include "io/safetensors.h"
#include "io/sharded.h"

namespace detour::io {
namespace {

namespace fs = std::filesystem;

// In the form of io_oracle.py.
std::string Describe(const SafetensorsFile& file) {
  Json metadata = Json::object();
  for (const auto& [key, value] : file.metadata()) metadata[key] = value;
  std::string out = "metadata " + metadata.dump(-1, ' ', true) + "\n";
  for (const auto& [name, info] : file.tensors()) {
    if (name.find('\n') != name.npos) continue;
    std::string hex;
    for (const std::byte b : info.bytes) hex += fmt::format("{:02x}", static_cast<int>(b));
    out += fmt::format("{} {} {} {}\n", name, DTypeName(info.dtype),
                       info.shape.empty() ? "-" : fmt::format("{}", fmt::join(info.shape, ",")),
                       hex.empty() ? "-" : hex);
  }
  return out;
}

// Bits, but any NaN equals any NaN.
void ExpectSame(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
  ASSERT_EQ(a.size(), b.size());
  int64_t num_wrong = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    num_wrong += std::memcmp(&a[i], &b[i], sizeof(float)) != 0;
  }
  EXPECT_EQ(num_wrong, 0) << what;
}

std::vector<float> Converted(const std::vector<float>& values, DType dtype) {
  std::vector<float> out(values.size());
  ConvertToF32(ConvertF32(values, dtype), dtype, out);
  return out;
}

TEST(Oracle, PythonAgrees) {
  const std::string python = DETOUR_SOURCE_DIR "/.venv/bin/python";
  if (!fs::exists(python)) GTEST_SKIP() << "no .venv/bin/python: run scripts/setup";
  std::string dir = testing::TempDir() + "detour_oracle_XXXXXX";
  ASSERT_NE(mkdtemp(dir.data()), nullptr);

  std::vector<std::byte> data(48);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::byte>(i % 3 == 0);
  std::vector<TensorToWrite> tensors;
  for (int i = 9; i >= 0; --i) {  // narrow first: the writer aligns
    const auto dtype = static_cast<DType>(i);
    tensors.push_back({std::string("t.") + DTypeName(dtype),
                       dtype,
                       {3, 2},
                       std::span(data).first(6 * DTypeBytes(dtype))});
  }
  tensors.push_back({"scalar", DType::kF32, {}, std::span(data).first(4)});
  tensors.push_back({"none", DType::kBF16, {0, 3}, {}});
  WriteSafetensors(dir + "/cpp.safetensors", tensors, {{"step", "12"}});
  tensors = {{"odd", DType::kU8, {3}, std::span(data).first(3)},
             {"wide", DType::kF32, {2}, std::span(data).first(8)}};
  WriteSafetensors(dir + "/mixed.safetensors", tensors);

  const std::string command =
      fmt::format("'{}' '{}/tests/io_oracle.py' '{}'", python, DETOUR_SOURCE_DIR, dir);
  ASSERT_EQ(std::system(command.c_str()), 0);

  for (const char* name : {"cpp", "mixed", "python"}) {
    const std::string stem = dir + "/" + name;
    EXPECT_EQ(Describe(SafetensorsFile::Open(stem + ".safetensors")), ReadFile(stem + ".txt"));
  }
  EXPECT_TRUE(SafetensorsFile::Open(dir + "/python.safetensors").Has("odd \"näme\"\n"));

  const auto casts = SafetensorsFile::Open(dir + "/convert.safetensors");
  for (const std::string name : {"f16", "bf16", "f64"}) {
    ExpectSame(casts.ReadF32(name), casts.ReadF32(name + "_as_f32"), name.c_str());
  }
  const std::vector<float> f32 = casts.ReadF32("f32");
  ExpectSame(Converted(f32, DType::kF16), casts.ReadF32("f32_as_f16"), "f32 to f16");
  ExpectSame(Converted(f32, DType::kBF16), casts.ReadF32("f32_as_bf16"), "f32 to bf16");

  const auto sharded = ShardedTensors::Open(dir + "/sharded");
  EXPECT_GT(sharded.files().size(), 1u);
  EXPECT_EQ(sharded.Names().size(), 6u);
  EXPECT_EQ(sharded.ReadF32("model.layers.4.weight", std::array<int64_t, 2>{64, 64}),
            std::vector<float>(64 * 64, 4.0f));
  fs::remove_all(dir);
}

}  // namespace
}  // namespace detour::io
