#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>

#include "core/op_counter.h"
#include "kernels/reference.h"
#include "kernels/test_util.h"

namespace detour::kernels {
namespace {

constexpr float kEps = std::numeric_limits<float>::epsilon();

// Odd strides: rows are not aligned, and what lies between them must stay as it is.
struct Case {
  int64_t num_rows, num_outputs, num_inputs;
  int64_t ldx = num_inputs + 3, ldy = num_outputs + 5;
  std::vector<float> x = RandomFloats(num_rows * ldx, 1);
  std::vector<float> w = RandomFloats(num_outputs * num_inputs, 2);
  std::vector<float> bias = RandomFloats(num_outputs, 3);

  std::vector<float> Expected(bool with_bias) const {
    std::vector<float> y(num_rows * ldy, -7.0f);
    reference::Gemm(x.data(), ldx, num_rows, w.data(), num_outputs, num_inputs,
                    with_bias ? bias.data() : nullptr, y.data(), ldy);
    return y;
  }
  PackedMatrix Packed() const {
    PackedMatrix packed;
    packed.Pack(w.data(), num_outputs, num_inputs, num_inputs);
    return packed;
  }
  std::vector<float> Run(bool with_bias) const {
    std::vector<float> y(num_rows * ldy, -7.0f);
    Gemm(x.data(), ldx, num_rows, Packed(), with_bias ? bias.data() : nullptr, y.data(), ldy);
    return y;
  }
};

void ExpectExact(int64_t num_rows, int64_t num_outputs, int64_t num_inputs) {
  SCOPED_TRACE(::testing::Message() << num_rows << " x " << num_outputs << " x " << num_inputs);
  const Case c{num_rows, num_outputs, num_inputs};
  const std::vector<float> plain = c.Expected(false), with_bias = c.Expected(true);
  OnEachTarget([&] {
    EXPECT_TRUE(SameBits(c.Run(false), plain));
    EXPECT_TRUE(SameBits(c.Run(true), with_bias));
  });
}

TEST(Gemm, EqualsReference) {
  for (const int64_t num_rows : {1, 2, 5, 12, 13, 64, 100}) {
    for (const int64_t num_outputs : {1, 3, 16, 31, 32, 33, 64, 96, 130}) {
      for (const int64_t num_inputs : {1, 3, 33, 130}) {
        ExpectExact(num_rows, num_outputs, num_inputs);
      }
    }
  }
}

TEST(Gemm, EqualsReferenceForEveryTileHeight) {
  for (int64_t num_rows = 1; num_rows <= 26; ++num_rows) ExpectExact(num_rows, 129, 20);
}

TEST(Gemm, EqualsReferenceAcrossBlocks) {
  ExpectExact(1, 300, 1300);  // several blocks of the reduction, panels in pairs
  ExpectExact(3, 97, 513);
  ExpectExact(125, 70, 1100);  // and two blocks of rows
  ExpectExact(300, 96, 64);
  ExpectExact(2, 3000, 96);  // large enough to be shared by threads
}

/// Row-major [rows, columns] with row stride ld, as its transpose.
std::vector<float> Transposed(const std::vector<float>& x, int64_t rows, int64_t columns,
                              int64_t ld) {
  std::vector<float> y(rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) y[c * rows + r] = x[r * ld + c];
  }
  return y;
}

TEST(GemmBackward, TransposedOperandsGiveTheSameBits) {
  for (const auto& [num_rows, num_outputs, num_inputs] :
       {std::array<int64_t, 3>{1, 1, 1}, {5, 33, 40}, {130, 70, 1100}, {12, 96, 513}}) {
    const Case c{num_rows, num_outputs, num_inputs};
    const std::vector<float> expected = c.Expected(false);
    const std::vector<float> x = Transposed(c.x, num_rows, num_inputs, c.ldx);
    const std::vector<float> w = Transposed(c.w, num_outputs, num_inputs, num_inputs);
    PackedMatrix packed;
    packed.Pack(c.w.data(), 1, 1, 1);  // a buffer that is too small
    packed.PackTransposed(w.data(), num_outputs, num_inputs, num_outputs);
    OnEachTarget([&] {
      std::vector<float> y(expected.size(), -7.0f);
      GemmBackward(x.data(), num_rows, num_rows, packed, {.transposed = true}, y.data(), c.ldy);
      EXPECT_TRUE(SameBits(y, expected));
    });
  }
}

// A sum over inputs in two calls is the sum in one.
TEST(GemmBackward, AddsToWhatIsThere) {
  const Case c{30, 70, 700};
  const std::vector<float> expected = c.Expected(false);
  const std::vector<float> w = Transposed(c.w, c.num_outputs, c.num_inputs, c.num_inputs);
  const int64_t split = 260;
  PackedMatrix first, second;
  first.PackTransposed(w.data(), c.num_outputs, split, c.num_outputs);
  second.PackTransposed(w.data() + split * c.num_outputs, c.num_outputs, c.num_inputs - split,
                        c.num_outputs);
  OnEachTarget([&] {
    std::vector<float> y(expected.size(), -7.0f);
    GemmBackward(c.x.data(), c.ldx, c.num_rows, first, {}, y.data(), c.ldy);
    GemmBackward(c.x.data() + split, c.ldx, c.num_rows, second, {.add = true}, y.data(), c.ldy);
    EXPECT_TRUE(SameBits(y, expected));
  });
}

TEST(Gemm, RowsDoNotDependOnTheirNumber) {
  const Case c{150, 70, 600};
  const PackedMatrix packed = c.Packed();
  OnEachTarget([&] {
    const std::vector<float> all = c.Run(true);
    for (const int64_t step : {1, 7, 64}) {
      std::vector<float> parts(c.num_rows * c.ldy, -7.0f);
      for (int64_t r = 0; r < c.num_rows; r += step) {
        Gemm(c.x.data() + r * c.ldx, c.ldx, std::min(step, c.num_rows - r), packed, c.bias.data(),
             parts.data() + r * c.ldy, c.ldy);
      }
      EXPECT_TRUE(SameBits(parts, all));
    }
  });
}

TEST(Gemm, ErrorWithinBound) {
  const Case c{20, 40, 2000};
  const std::vector<float> y = c.Run(false);
  for (int64_t n = 0; n < c.num_rows; ++n) {
    for (int64_t m = 0; m < c.num_outputs; ++m) {
      double exact = 0, magnitude = 0;
      for (int64_t k = 0; k < c.num_inputs; ++k) {
        const double term = double{c.x[n * c.ldx + k]} * c.w[m * c.num_inputs + k];
        exact += term;
        magnitude += std::abs(term);
      }
      // Each of the K roundings is at most eps/2 of a partial sum.
      EXPECT_LE(std::abs(y[n * c.ldy + m] - exact), c.num_inputs * kEps / 2 * magnitude);
    }
  }
}

TEST(Gemm, CountsOperations) {
  const Case c{5, 33, 17};
  GlobalOpCounter().Reset();
  c.Run(true);
  EXPECT_EQ(GlobalOpCounter().gemm_flops, 2 * 5 * 33 * 17);
}

TEST(Gemm, NoRows) {
  const Case c{1, 33, 17};
  Gemm(nullptr, c.num_inputs, 0, c.Packed(), nullptr, nullptr, c.num_outputs);
}

TEST(PackedMatrix, HasPanelsOfZeroPaddedOutputsAndReusesItsBuffer) {
  const Case c{1, 37, 19};
  PackedMatrix packed = c.Packed();
  EXPECT_EQ(packed.bytes(), 2 * 32 * 19 * 4);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(packed.data()) % 64, 0);
  const auto at = [&](int64_t i) { return reinterpret_cast<const float*>(packed.data())[i]; };
  for (int64_t m = 0; m < 64; ++m) {
    for (int64_t k = 0; k < 19; ++k) {
      EXPECT_EQ(at((m / 32 * 19 + k) * 32 + m % 32), m < 37 ? c.w[m * 19 + k] : 0.0f);
    }
  }
  const std::byte* before = packed.data();
  packed.Pack(c.w.data(), 37, 10, 19);
  EXPECT_EQ(packed.num_inputs(), 10);
  EXPECT_EQ(at(9 * 32 + 4), c.w[4 * 19 + 9]);
  EXPECT_EQ(packed.data(), before);
  packed.Pack(c.w.data(), 37, 19, 19);
  EXPECT_EQ(packed.data(), before);
}

/// The code of the Error that `fn` throws.
template <class Fn>
std::string CodeOf(const Fn& fn) {
  try {
    fn();
    return "none";
  } catch (const Error& e) {
    return e.code();
  }
}

TEST(Simd, Names) {
  EXPECT_EQ(ParseSimd("auto"), Simd::kAuto);
  EXPECT_EQ(ParseSimd("avx2"), Simd::kAvx2);
  EXPECT_EQ(ParseSimd("avx512"), Simd::kAvx512);
  EXPECT_EQ(CodeOf([] { ParseSimd("sse2"); }), "flag.simd");
  SetSimd(Simd::kAvx2);
  EXPECT_EQ(SimdName(), "avx2");
  const bool have_avx512 = HaveAvx512();
  EXPECT_EQ(SimdName(), have_avx512 ? "avx512" : "avx2");
  SetSimd(Simd::kAuto);
}

TEST(Simd, OlderCpus) {
  hwy::SetSupportedTargetsForTest(HWY_AVX2);
  EXPECT_EQ(CodeOf([] { SetSimd(Simd::kAvx512); }), "kernels.simd");
  SetSimd(Simd::kAuto);
  EXPECT_EQ(SimdName(), "avx2");
  hwy::SetSupportedTargetsForTest(HWY_SSE4);
  EXPECT_EQ(CodeOf([] { SetSimd(Simd::kAuto); }), "kernels.simd");
  EXPECT_EQ(CodeOf([] { SetSimd(Simd::kAvx2); }), "kernels.simd");
  hwy::SetSupportedTargetsForTest(0);
  SetSimd(Simd::kAuto);
}

}  // namespace
}  // namespace detour::kernels
