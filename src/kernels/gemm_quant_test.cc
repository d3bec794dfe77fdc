#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/half.h"
#include "kernels/gemm.h"
#include "kernels/reference.h"
#include "kernels/test_util.h"

namespace detour::kernels {
namespace {

constexpr WeightFormat kQuantFormats[] = {WeightFormat::kQ8, WeightFormat::kQ4,
                                          WeightFormat::kQ4Min};

/// Random blocks that use every number of the format, scales of both signs included.
std::vector<QuantBlock> RandomBlocks(WeightFormat format, int64_t n, uint64_t seed) {
  const Rng rng(seed, RngPurpose::kTest);
  std::vector<QuantBlock> blocks(n);
  uint64_t i = 0;
  for (QuantBlock& block : blocks) {
    const auto scale = static_cast<float>(0.02 * rng.Uniform(i++) - 0.005);
    block.scale = F32ToF16Bits(std::bit_cast<uint32_t>(scale));
    if (format == WeightFormat::kQ4Min) block.min = F32ToF16Bits(std::bit_cast<uint32_t>(-scale));
    for (int8_t& q : block.q) {
      const double u = rng.Uniform(i++);
      q = static_cast<int8_t>(format == WeightFormat::kQ8 ? 255 * u - 127 : 16 * u);
    }
  }
  return blocks;
}

struct Case {
  WeightFormat format;
  int64_t num_rows, num_outputs, num_inputs;
  int64_t num_blocks = (num_inputs + 31) / 32, ldx = num_inputs + 3, ldy = num_outputs + 5;
  std::vector<float> x = RandomFloats(num_rows * ldx, 1, 3);
  std::vector<float> bias = RandomFloats(num_outputs, 3);
  std::vector<QuantBlock> w = RandomBlocks(format, num_outputs* num_blocks, 2);

  PackedMatrix Packed() const {
    PackedMatrix packed;
    packed.PackBlocks(format, num_outputs, num_inputs, [&](int64_t m, QuantBlock* row) {
      std::copy_n(w.begin() + m * num_blocks, num_blocks, row);
    });
    return packed;
  }
  std::vector<float> Expected(bool with_bias) const {
    std::vector<float> y(num_rows * ldy, -7.0f);
    reference::GemmQuant(x.data(), ldx, num_rows, w.data(), format, num_outputs, num_inputs,
                         with_bias ? bias.data() : nullptr, y.data(), ldy);
    return y;
  }
  std::vector<float> Run(bool with_bias) const {
    std::vector<float> y(num_rows * ldy, -7.0f);
    Gemm(x.data(), ldx, num_rows, Packed(), with_bias ? bias.data() : nullptr, y.data(), ldy);
    return y;
  }
};

void ExpectExact(const Case& c) {
  SCOPED_TRACE(::testing::Message() << "format " << static_cast<int>(c.format) << ", " << c.num_rows
                                    << " x " << c.num_outputs << " x " << c.num_inputs);
  const std::vector<float> plain = c.Expected(false), with_bias = c.Expected(true);
  OnEachTarget([&] {
    EXPECT_TRUE(SameBits(c.Run(false), plain));
    EXPECT_TRUE(SameBits(c.Run(true), with_bias));
  });
  if (!HaveAvx512()) return;
  // As on a CPU without the dot product of bytes.
  AllowVnni(false);
  EXPECT_TRUE(SameBits(c.Run(true), with_bias));
  AllowVnni(true);
  SetSimd(Simd::kAuto);
}

TEST(GemmQuant, EqualsReference) {
  for (const WeightFormat format : kQuantFormats) {
    for (const int64_t num_rows : {1, 2, 3, 6, 7, 13, 125}) {
      for (const int64_t num_outputs : {1, 16, 31, 64, 130}) {
        for (const int64_t num_inputs : {1, 31, 32, 33, 130}) {
          ExpectExact({format, num_rows, num_outputs, num_inputs});
        }
      }
    }
    ExpectExact({format, 1, 3000, 577});  // large enough to be shared by threads
  }
}

TEST(GemmQuant, HasTheLargestDotProducts) {
  for (const WeightFormat format : kQuantFormats) {
    Case c{format, 2, 40, 96};
    std::fill(c.x.begin(), c.x.end(), -1.0f);
    for (QuantBlock& block : c.w) {
      std::fill_n(block.q, 32,
                  int8_t{static_cast<int8_t>(format == WeightFormat::kQ8 ? -127 : 15)});
    }
    ExpectExact(c);
  }
}

TEST(GemmQuant, ZerosTiesAndWhatIsNotANumber) {
  for (const WeightFormat format : kQuantFormats) {
    Case c{format, 5, 40, 64};
    std::fill_n(c.x.begin(), c.ldx, 0.0f);
    for (int64_t i = 0; i < 64; ++i)
      c.x[c.ldx + i] = static_cast<float>(i % 32) - 0.5f + 96;  // ties
    c.x[c.ldx + 3] = 127.0f;
    c.x[2 * c.ldx + 40] = std::numeric_limits<float>::quiet_NaN();
    c.x[3 * c.ldx + 1] = -std::numeric_limits<float>::infinity();
    c.x[4 * c.ldx + 63] = 1e-40f;
    ExpectExact(c);
    const std::vector<float> y = c.Run(false);
    for (int64_t m = 0; m < c.num_outputs; ++m) {
      EXPECT_EQ(y[m], 0.0f);
      EXPECT_TRUE(std::isnan(y[2 * c.ldy + m]) && std::isnan(y[3 * c.ldy + m]));
      EXPECT_TRUE(std::isfinite(y[4 * c.ldy + m]));
    }
  }
}

// What a product must be, by the bounds of rounding alone: nothing here knows the layout.
TEST(GemmQuant, IsNearTheProductOfTheWeightsItHolds) {
  for (const WeightFormat format : kQuantFormats) {
    const Case c{format, 4, 37, 200};
    const PackedMatrix packed = c.Packed();
    const std::vector<float> y = c.Run(false);
    std::vector<float> row(c.num_inputs);
    for (int64_t m = 0; m < c.num_outputs; ++m) {
      packed.CopyRow(m, row.data());
      for (int64_t n = 0; n < c.num_rows; ++n) {
        double exact = 0, weights = 0;
        for (int64_t k = 0; k < c.num_inputs; ++k) {
          exact += double{c.x[n * c.ldx + k]} * row[k];
          weights += std::abs(row[k]);
        }
        // |x| < 3: each is off by half of 3 / 127 at most.
        EXPECT_NEAR(y[n * c.ldy + m], exact, weights * 3 / 254 * 1.01 + 1e-4);
      }
    }
  }
}

TEST(PackedMatrix, QuantizesToTheNearestAndAgainToTheSame) {
  const int64_t outputs = 45, inputs = 100;
  std::vector<float> w = RandomFloats(outputs * inputs, 5, 0.3f);
  std::fill_n(w.begin() + 3 * inputs, inputs, 0.0f);
  for (const auto& [format, steps] : {std::pair{WeightFormat::kQ8, 127.0f},
                                      {WeightFormat::kQ4, 8.0f},
                                      {WeightFormat::kQ4Min, 15.0f}}) {
    PackedMatrix packed, again;
    packed.Pack(w.data(), outputs, inputs, inputs, format);
    std::vector<float> rows(w.size()), same(w.size());
    for (int64_t m = 0; m < outputs; ++m) packed.CopyRow(m, rows.data() + m * inputs);
    for (int64_t i = 0; i < std::ssize(w); ++i) {
      // One step at most: q4 has 7 steps on one side only; f16 rounds the scale.
      EXPECT_NEAR(rows[i], w[i], 0.6f / steps * (format == WeightFormat::kQ4 ? 0.51f : 0.26f * 2));
    }
    again.Pack(rows.data(), outputs, inputs, inputs, format);
    for (int64_t m = 0; m < outputs; ++m) again.CopyRow(m, same.data() + m * inputs);
    if (format != WeightFormat::kQ4Min) {
      EXPECT_TRUE(SameBits(same, rows));
    }
  }
}

TEST(PackedMatrix, HasTheBytesItSays) {
  const std::vector<float> w = RandomFloats(64 * 96, 5);
  const auto bytes = [&](WeightFormat format) {
    PackedMatrix packed;
    packed.Pack(w.data(), 64, 96, 96, format);
    return packed.bytes();
  };
  EXPECT_EQ(bytes(WeightFormat::kF32), 64 * 96 * 4);
  EXPECT_EQ(bytes(WeightFormat::kBf16), 64 * 96 * 2);
  EXPECT_EQ(bytes(WeightFormat::kQ8), 64 * 96 * 17 / 16);
  EXPECT_EQ(bytes(WeightFormat::kQ4), 64 * 96 * 9 / 16);
  EXPECT_EQ(bytes(WeightFormat::kQ4Min), 64 * 96 * 5 / 8);
}

// By the definition: nearest q to (w - min) / scale, halves away from 0 (q8) or up.
TEST(PackedMatrix, QuantizesByTheDefinitionOnEachTarget) {
  std::vector<float> w = RandomFloats(32, 9, 2);
  w[3] = 0.5f;
  w[4] = -0.5f;
  w[7] = 127;  // so that q8 has the scale 1 and halves
  for (const WeightFormat format : {WeightFormat::kQ8, WeightFormat::kQ4, WeightFormat::kQ4Min}) {
    OnEachTarget([&] {
      PackedMatrix packed;
      packed.Pack(w.data(), 1, 32, 32, format);
      QuantBlock block;
      packed.CopyBlocks(0, &block);
      const double low = *std::min_element(w.begin(), w.end()), step = (127 - low) / 15;
      for (int64_t i = 0; i < 32; ++i) {
        const double expected = format == WeightFormat::kQ8 ? std::round(w[i])
                                : format == WeightFormat::kQ4
                                    ? std::floor(w[i] / (127 / -8.0) + 8.5)
                                    : std::floor((w[i] - low) / step + 0.5);
        EXPECT_EQ(block.q[i], expected) << i;
      }
    });
  }
}

TEST(PackedMatrix, WhatNoScaleCanHoldIsAnError) {
  for (const float wild : {1e8f, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    for (const WeightFormat format : {WeightFormat::kQ8, WeightFormat::kQ4, WeightFormat::kQ4Min}) {
      std::vector<float> w(64, 1.0f);
      w[40] = wild;
      PackedMatrix packed;
      try {
        packed.Pack(w.data(), 1, 64, 64, format);
        FAIL() << wild;
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), "weights.range");
      }
    }
  }
}

TEST(PackedMatrix, ManyShareChunksOfMemory) {
  const std::vector<float> w = RandomFloats(int64_t{1024} * 1024, 6);
  std::vector<PackedMatrix> matrices;
  for (int i = 0; i < 40; ++i) {  // 160 MB
    PackedMatrix packed;
    packed.Pack(w.data() + i, 1023, 1000, 1024);
    matrices.push_back(std::move(packed));
    if (i % 3 == 2) matrices.erase(matrices.begin());
  }
  std::vector<float> row(1000);
  for (size_t i = 0; i < matrices.size(); ++i) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(matrices[i].data()) % 64, 0);
    const int64_t shift = std::ssize(matrices) - 1 - static_cast<int64_t>(i);
    matrices[i].CopyRow(1022, row.data());
    EXPECT_TRUE(SameBits(
        row, {w.begin() + 1022 * 1024 + 39 - shift, w.begin() + 1022 * 1024 + 39 - shift + 1000}));
  }
}

TEST(Gemm, Bf16IsGemmOfRoundedWeights) {
  const int64_t rows = 14, outputs = 70, inputs = 600;
  const std::vector<float> x = RandomFloats(rows * inputs, 1),
                           w = RandomFloats(outputs * inputs, 2);
  PackedMatrix packed;
  packed.Pack(w.data(), outputs, inputs, inputs, WeightFormat::kBf16);
  std::vector<float> rounded(w.size()), expected(rows * outputs), y(rows * outputs);
  for (int64_t m = 0; m < outputs; ++m) packed.CopyRow(m, rounded.data() + m * inputs);
  for (size_t i = 0; i < w.size(); ++i) EXPECT_NEAR(rounded[i], w[i], std::abs(w[i]) / 256);
  reference::Gemm(x.data(), inputs, rows, rounded.data(), outputs, inputs, nullptr, expected.data(),
                  outputs);
  OnEachTarget([&] {
    for (const int64_t n : {int64_t{1}, rows}) {
      Gemm(x.data(), inputs, n, packed, nullptr, y.data(), outputs);
      EXPECT_TRUE(SameBits({y.begin(), y.begin() + n * outputs},
                           {expected.begin(), expected.begin() + n * outputs}));
    }
  });
}

}  // namespace
}  // namespace detour::kernels
