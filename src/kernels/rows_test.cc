#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "kernels/reference.h"
#include "kernels/test_util.h"

namespace detour::kernels {
namespace {

using Floats = std::vector<float>;
constexpr float kEps = std::numeric_limits<float>::epsilon();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
const int64_t kRows[] = {1, 2, 5, 12, 13, 64, 100, 130};
const int64_t kDims[] = {1, 3, 8, 15, 16, 17, 24, 31, 32, 33, 64, 96, 130};

/// Calls `fn(rows, dim)` for every pair.
void ForShapes(const std::function<void(int64_t, int64_t)>& fn) {
  for (const int64_t rows : kRows) {
    for (const int64_t dim : kDims) {
      SCOPED_TRACE(::testing::Message() << rows << " x " << dim);
      fn(rows, dim);
    }
  }
}

Floats ExpOf(const Floats& x) {
  Floats y(x.size());
  Exp(x.data(), x.size(), y.data());
  return y;
}

TEST(Exp, EqualsReferenceAndDoubleWithinOneUlp) {
  Floats x;
  for (float v = -90; v < 90; v += 0.00037f) x.push_back(v);
  for (float v = 1e-30f; v < 1; v *= 1.01f) x.insert(x.end(), {v, -v});
  double worst = 0;
  Floats expected(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(double{x[i]});
    expected[i] = reference::Exp(x[i]);
    if (exact < 0x1p-126) {
      EXPECT_EQ(expected[i], 0.0f) << x[i];
    } else if (exact > std::numeric_limits<float>::max()) {
      EXPECT_EQ(expected[i], kInfinity) << x[i];
    } else {
      const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
      worst = std::max(worst, std::abs(expected[i] - exact) / ulp);
    }
  }
  EXPECT_LE(worst, 1.0);
  RecordProperty("worst_ulp", std::to_string(worst));
  OnEachTarget([&] { EXPECT_TRUE(SameBits(ExpOf(x), expected)); });
}

TEST(Exp, SpecialValues) {
  using namespace reference::exp_constants;
  const float nan_with_payload = std::bit_cast<float>(0x7fc12345u);
  const Floats x = {0.0f,
                    -0.0f,
                    1.0f,
                    -kInfinity,
                    kInfinity,
                    -1e30f,
                    1e30f,
                    kMax,
                    kMin,
                    100,
                    -100,
                    89,
                    -88,
                    std::nextafter(kMax, 100.0f),
                    std::nextafter(kMin, -100.0f),
                    1e-45f,
                    std::nanf(""),
                    nan_with_payload,
                    -nan_with_payload};
  Floats expected;
  for (const float v : x) expected.push_back(reference::Exp(v));
  EXPECT_EQ(expected[0], 1.0f);
  EXPECT_EQ(expected[1], 1.0f);
  EXPECT_TRUE(SameBits(expected[3], 0.0f));
  EXPECT_EQ(expected[4], kInfinity);
  EXPECT_TRUE(SameBits(expected[5], 0.0f));
  EXPECT_EQ(expected[6], kInfinity);
  EXPECT_LT(expected[7], kInfinity);
  EXPECT_GE(expected[8], 0x1p-126f);
  EXPECT_EQ(expected[13], kInfinity);
  EXPECT_TRUE(SameBits(expected[14], 0.0f));
  for (int i = 16; i < 19; ++i) EXPECT_TRUE(std::isnan(expected[i]));
  OnEachTarget([&] { EXPECT_TRUE(SameBits(ExpOf(x), expected)); });
}

TEST(RmsNorm, EqualsReference) {
  ForShapes([](int64_t rows, int64_t dim) {
    const Floats x = RandomFloats(rows * dim, 1), w = RandomFloats(dim, 2);
    Floats y(rows * dim), inv(rows);
    reference::RmsNorm(x.data(), rows, dim, w.data(), 1e-5f, y.data(), inv.data());
    OnEachTarget([&] {
      Floats y2(rows * dim), inv2(rows);
      RmsNorm(x.data(), rows, dim, w.data(), 1e-5f, y2.data(), inv2.data());
      EXPECT_TRUE(SameBits(y2, y));
      EXPECT_TRUE(SameBits(inv2, inv));
      RmsNorm(x.data(), rows, dim, w.data(), 1e-5f, y2.data(), nullptr);
      EXPECT_TRUE(SameBits(y2, y));
    });
  });
}

TEST(RmsNorm, ErrorWithinBound) {
  const int64_t dim = 1000;
  const Floats x = RandomFloats(dim, 1), w = RandomFloats(dim, 2);
  Floats y(dim);
  RmsNorm(x.data(), 1, dim, w.data(), 1e-5f, y.data(), nullptr);
  double sum = 0;
  for (const float v : x) sum += double{v} * v;
  const double inv = 1 / std::sqrt(sum / dim + 1e-5);
  // The sum has dim/16 + 4 roundings, halved by the root; a handful follow.
  const double bound = kEps / 2 * ((dim / 16.0 + 4) / 2 + 6);
  for (int64_t i = 0; i < dim; ++i) {
    const double exact = x[i] * inv * w[i];
    EXPECT_NEAR(y[i], exact, bound * std::abs(exact));
  }
}

TEST(RmsNormBackward, EqualsReference) {
  ForShapes([](int64_t rows, int64_t dim) {
    const Floats x = RandomFloats(rows * dim, 1), w = RandomFloats(dim, 2);
    const Floats dy = RandomFloats(rows * dim, 3);
    Floats y(rows * dim), inv(rows), dx(rows * dim), dw(dim);
    reference::RmsNorm(x.data(), rows, dim, w.data(), 1e-5f, y.data(), inv.data());
    reference::RmsNormBackward(dy.data(), x.data(), w.data(), inv.data(), rows, dim, dx.data(),
                               dw.data());
    OnEachTarget([&] {
      Floats dx2(rows * dim, 5), dw2(dim, 5);
      RmsNormBackward(dy.data(), x.data(), w.data(), inv.data(), rows, dim, dx2.data(), dw2.data());
      EXPECT_TRUE(SameBits(dx2, dx));
      EXPECT_TRUE(SameBits(dw2, dw));
    });
  });
}

TEST(RmsNormBackward, EqualsFiniteDifferences) {
  const int64_t rows = 70, dim = 33;
  const Floats x = RandomFloats(rows * dim, 1), w = RandomFloats(dim, 2);
  const Floats dy = RandomFloats(rows * dim, 3);
  Floats y(rows * dim), inv(rows), dx(rows * dim), dw(dim);
  RmsNorm(x.data(), rows, dim, w.data(), 1e-5f, y.data(), inv.data());
  RmsNormBackward(dy.data(), x.data(), w.data(), inv.data(), rows, dim, dx.data(), dw.data());
  // Σ_i dy_i y_i of one row in double, with x_k moved by h.
  const auto value = [&](int64_t r, int64_t k, double h) {
    double sum = 0, out = 0;
    const auto at = [&](int64_t i) { return x[r * dim + i] + (i == k ? h : 0.0); };
    for (int64_t i = 0; i < dim; ++i) sum += at(i) * at(i);
    for (int64_t i = 0; i < dim; ++i) {
      out += dy[r * dim + i] * at(i) * w[i] / std::sqrt(sum / dim + 1e-5);
    }
    return out;
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < dim; ++k) {
      EXPECT_NEAR(dx[r * dim + k], (value(r, k, 1e-5) - value(r, k, -1e-5)) / 2e-5, 1e-5);
    }
  }
  for (int64_t k = 0; k < dim; ++k) {
    double exact = 0;
    for (int64_t r = 0; r < rows; ++r) exact += double{dy[r * dim + k]} * x[r * dim + k] * inv[r];
    EXPECT_NEAR(dw[k], exact, rows * kEps * rows);
  }
}

TEST(Rope, EqualsReferenceAndInverts) {
  for (const int64_t head_dim : {2, 20, 32, 64, 128}) {
    const int64_t rows = 37, heads = 3, width = heads * head_dim, ldx = width + 3, ldy = width + 1;
    const int64_t max_position = 50, half = head_dim / 2;
    Floats table(max_position * head_dim);
    for (int64_t p = 0; p < max_position; ++p) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle = p * std::pow(10000.0, -2.0 * i / head_dim);
        table[p * head_dim + i] = static_cast<float>(std::cos(angle));
        table[p * head_dim + half + i] = static_cast<float>(std::sin(angle));
      }
    }
    std::vector<int32_t> positions(rows);
    for (int64_t r = 0; r < rows; ++r) positions[r] = static_cast<int32_t>(r * 7 % max_position);
    const Floats x = RandomFloats(rows * ldx, 1);
    for (const bool inverse : {false, true}) {
      Floats y(rows * ldy, -7);
      reference::Rope(x.data(), ldx, rows, heads, head_dim, positions.data(), table.data(), inverse,
                      y.data(), ldy);
      OnEachTarget([&] {
        Floats y2(rows * ldy, -7);
        Rope(x.data(), ldx, rows, heads, head_dim, positions.data(), table.data(), inverse,
             y2.data(), ldy);
        EXPECT_TRUE(SameBits(y2, y));
        Rope(y2.data(), ldy, rows, heads, head_dim, positions.data(), table.data(), !inverse,
             y2.data(), ldy);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < width; ++i) {
            EXPECT_NEAR(y2[r * ldy + i], x[r * ldx + i], 4 * kEps);
          }
        }
      });
    }
  }
}

TEST(Activations, EqualReference) {
  for (const int64_t n : {1, 7, 8, 16, 31, 33, 1000, 50001}) {
    const Floats g = RandomFloats(n, 1, 20), u = RandomFloats(n, 2), dh = RandomFloats(n, 3);
    Floats h(n), dg(n), du(n), silu(n), dx(n), sigmoid(n);
    reference::SiluMul(g.data(), u.data(), n, h.data());
    reference::SiluMulBackward(dh.data(), g.data(), u.data(), n, dg.data(), du.data());
    reference::Silu(g.data(), n, silu.data());
    reference::SiluBackward(dh.data(), g.data(), n, dx.data());
    reference::Sigmoid(g.data(), n, sigmoid.data());
    OnEachTarget([&] {
      Floats got(n), in_place_g = g, in_place_u = u;
      SiluMul(g.data(), u.data(), n, got.data());
      EXPECT_TRUE(SameBits(got, h));
      SiluMulBackward(dh.data(), in_place_g.data(), in_place_u.data(), n, in_place_g.data(),
                      in_place_u.data());
      EXPECT_TRUE(SameBits(in_place_g, dg));
      EXPECT_TRUE(SameBits(in_place_u, du));
      Silu(g.data(), n, got.data());
      EXPECT_TRUE(SameBits(got, silu));
      SiluBackward(dh.data(), g.data(), n, got.data());
      EXPECT_TRUE(SameBits(got, dx));
      Sigmoid(g.data(), n, got.data());
      EXPECT_TRUE(SameBits(got, sigmoid));
    });
  }
}

TEST(Activations, GradientsEqualDoublePrecision) {
  const int64_t n = 500;
  const Floats g = RandomFloats(n, 1, 8), u = RandomFloats(n, 2), dh = RandomFloats(n, 3);
  Floats dg(n), du(n), dx(n);
  SiluMulBackward(dh.data(), g.data(), u.data(), n, dg.data(), du.data());
  SiluBackward(dh.data(), g.data(), n, dx.data());
  const auto silu = [](double x) { return x / (1 + std::exp(-x)); };
  for (int64_t i = 0; i < n; ++i) {
    const double slope = (silu(g[i] + 1e-5) - silu(g[i] - 1e-5)) / 2e-5;
    EXPECT_NEAR(dg[i], dh[i] * u[i] * slope, 1e-6);
    EXPECT_NEAR(du[i], dh[i] * silu(g[i]), 1e-6);
    EXPECT_NEAR(dx[i], dh[i] * slope, 1e-6);
  }
}

TEST(Activations, Saturate) {
  const Floats x = {-200, -88.5f, 0, 88.5f, 200};
  Floats silu(5), sigmoid(5);
  Silu(x.data(), 5, silu.data());
  Sigmoid(x.data(), 5, sigmoid.data());
  EXPECT_EQ(silu[0], 0.0f);
  EXPECT_EQ(silu[4], 200.0f);
  EXPECT_EQ(sigmoid[0], 0.0f);
  EXPECT_EQ(sigmoid[2], 0.5f);
  EXPECT_EQ(sigmoid[4], 1.0f);
}

TEST(AddScaledRows, EqualsReference) {
  ForShapes([](int64_t rows, int64_t dim) {
    const Floats x = RandomFloats(rows * dim, 1), f = RandomFloats(rows * dim, 2);
    const Floats weight = RandomFloats(rows, 3);
    for (const float* w : {weight.data(), static_cast<const float*>(nullptr)}) {
      Floats y(rows * dim);
      reference::AddScaledRows(x.data(), f.data(), w, rows, dim, y.data());
      OnEachTarget([&] {
        Floats over_x = x, over_f = f;
        AddScaledRows(over_x.data(), f.data(), w, rows, dim, over_x.data());
        AddScaledRows(x.data(), over_f.data(), w, rows, dim, over_f.data());
        EXPECT_TRUE(SameBits(over_x, y));
        EXPECT_TRUE(SameBits(over_f, y));
      });
    }
  });
}

TEST(Gather, ScatterAndRepeat) {
  const int64_t rows = 100, dim = 12, ld = 15;
  const Floats x = RandomFloats(rows * ld, 1);
  const std::vector<int32_t> index = {99, 0, 7, 42};
  OnEachTarget([&] {
    Floats gathered(4 * 13, -7), scattered(rows * ld, -7), repeated(rows * 25, -7);
    GatherRows(x.data(), ld, index.data(), 4, dim, gathered.data(), 13);
    ScatterRows(gathered.data(), 13, index.data(), 4, dim, scattered.data(), ld);
    RepeatKvRows(x.data(), ld, index.data(), 4, 3, 6, 4, repeated.data(), 25);
    for (int64_t r = 0; r < rows; ++r) {
      const bool taken = std::find(index.begin(), index.end(), r) != index.end();
      for (int64_t i = 0; i < ld; ++i) {
        EXPECT_EQ(scattered[r * ld + i], taken && i < dim ? x[r * ld + i] : -7);
      }
      for (int64_t i = 0; i < 25; ++i) {
        EXPECT_EQ(repeated[r * 25 + i], taken && i < 24 ? x[r * ld + i / 8 * 4 + i % 4] : -7);
      }
    }
  });
}

TEST(CrossEntropy, EqualsReference) {
  for (const int64_t vocab : {1, 3, 8, 16, 17, 31, 33, 130, 1000}) {
    const int64_t rows = 21;
    const Floats logits = RandomFloats(rows * vocab, 1, 10);
    std::vector<int32_t> targets(rows);
    for (int64_t r = 0; r < rows; ++r) {
      targets[r] = r % 5 == 4 ? -1 : static_cast<int32_t>(r * 13 % vocab);
    }
    for (const bool gradient : {false, true}) {
      Floats expected = logits, loss(rows);
      reference::CrossEntropyRows(expected.data(), rows, vocab, targets.data(), gradient, 0.3f,
                                  loss.data());
      OnEachTarget([&] {
        Floats got = logits, got_loss(rows, 9);
        CrossEntropyRows(got.data(), rows, vocab, targets.data(), gradient, 0.3f, got_loss.data());
        EXPECT_TRUE(SameBits(got, expected));
        EXPECT_TRUE(SameBits(got_loss, loss));
      });
    }
  }
}

TEST(CrossEntropy, EqualsDoublePrecision) {
  const int64_t vocab = 777;
  const Floats logits = RandomFloats(vocab, 1, 10);
  Floats gradient = logits;
  float loss;
  const int32_t target = 5;
  CrossEntropyRows(gradient.data(), 1, vocab, &target, true, 2.0f, &loss);
  double sum = 0;
  for (const float v : logits) sum += std::exp(double{v});
  EXPECT_NEAR(loss, std::log(sum) - logits[5], 1e-5);
  for (int64_t i = 0; i < vocab; ++i) {
    const double exact = 2 * (std::exp(double{logits[i]}) / sum - (i == target));
    EXPECT_NEAR(gradient[i], exact, 1e-5 * std::abs(exact) + 1e-12);
  }
}

}  // namespace
}  // namespace detour::kernels
