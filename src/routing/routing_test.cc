#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/rng.h"
#include "routing/controller.h"
#include "routing/plan.h"
#include "routing/registry.h"
#include "routing/router.h"

namespace detour::routing {
namespace {

using Layers = std::vector<int32_t>;

TEST(LayoutLayers, Names) {
  EXPECT_EQ(LayoutLayers("bilayer", 6), (Layers{1, 3, 5}));
  EXPECT_EQ(LayoutLayers("bilayer", 5), (Layers{1, 3}));
  EXPECT_EQ(LayoutLayers("bilayer_dense_ends", 8), (Layers{2, 4, 6}));
  EXPECT_EQ(LayoutLayers("bilayer_dense_ends", 7), (Layers{2, 4}));
  EXPECT_EQ(LayoutLayers("trilayer", 7), (Layers{1, 2, 4, 5}));
  EXPECT_EQ(LayoutLayers("all", 3), (Layers{0, 1, 2}));
  EXPECT_EQ(LayoutLayers("bilayer", 1), Layers{});
}

TEST(LayoutLayers, Lists) {
  EXPECT_EQ(LayoutLayers("0", 1), Layers{0});
  EXPECT_EQ(LayoutLayers("1,3,5", 6), (Layers{1, 3, 5}));
  for (const char* bad : {"bilayers", "3,1", "1,1", "6", "-1", "1;3", "1,,3", "1, 3", "1.5"}) {
    EXPECT_THROW(LayoutLayers(bad, 6), Error) << bad;
  }
}

TEST(Methods, KnownAndUnknown) {
  EXPECT_STREQ(FindMethod("dtrnet").name, "dtrnet");
  EXPECT_THROW(FindMethod("dense"), Error);  // the absence of a method
  EXPECT_THROW(FindMethod("mixture"), Error);
}

Stream Rows(int64_t n) { return Stream::FromSegments({{0, 0, n, 0}}); }

TEST(DrawFallbackRows, ShareAndKey) {
  const int64_t n = 100000;
  const DrawKey key{.seed = 7, .step = 3};
  const auto rows = DrawFallbackRows(key, 1, Rows(n), 0.15);
  // Five standard deviations of a binomial.
  EXPECT_NEAR(std::count(rows.begin(), rows.end(), 1), 0.15 * n, 5 * std::sqrt(n * 0.15 * 0.85));
  EXPECT_EQ(rows, DrawFallbackRows(key, 1, Rows(n), 0.15));
  EXPECT_NE(rows, DrawFallbackRows(key, 2, Rows(n), 0.15));
  EXPECT_NE(rows, DrawFallbackRows({.seed = 7, .step = 4}, 1, Rows(n), 0.15));
  EXPECT_NE(rows, DrawFallbackRows({.seed = 8, .step = 3}, 1, Rows(n), 0.15));
}

TEST(DrawFallbackRows, IndependentOfTheSplit) {
  const int64_t n = 1000;
  const auto whole = DrawFallbackRows({.seed = 5, .step = 2}, 0, Rows(n), 0.15);
  for (const int64_t part : {1, 100, 333, 512}) {
    std::vector<uint8_t> joined;
    for (int64_t first = 0; first < n; first += part) {
      const auto rows = DrawFallbackRows({.seed = 5, .step = 2, .first_row = first}, 0,
                                         Rows(std::min(part, n - first)), 0.15);
      joined.insert(joined.end(), rows.begin(), rows.end());
    }
    EXPECT_EQ(joined, whole) << part;
  }
}

TEST(DrawFallbackRows, Empty) {
  EXPECT_EQ(DrawFallbackRows({}, 0, Rows(4), 0.0), std::vector<uint8_t>(4, 0));
  EXPECT_TRUE(DrawFallbackRows({}, 0, Stream{}, 0.15).empty());
}

std::vector<float> Differences(int64_t n, double scale, double mean) {
  const Rng rng(11, RngPurpose::kTest);
  std::vector<float> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(scale * (rng.Normal(i) + mean));
  return v;
}

TEST(ControllerShift, HitsTheTargetAtAnyScale) {
  const int64_t n = 4096;
  for (const double scale : {1e-6, 1e-3, 1.0, 10.0}) {
    for (const double target : {0.01, 0.1, 0.5, 0.9}) {
      const std::vector<float> logits = Differences(n, scale, 0.3);
      double bias = 0;
      for (int step = 0; step < 60; ++step) {
        std::vector<float> shifted(n);
        for (int64_t i = 0; i < n; ++i) shifted[i] = static_cast<float>(logits[i] + bias);
        const double delta = ControllerShift(shifted, target, 1.0);
        EXPECT_LE(std::abs(delta), 1.0);
        bias += delta;
      }
      const int64_t above = std::count_if(
          logits.begin(), logits.end(), [&](float d) { return static_cast<float>(d + bias) > 0; });
      EXPECT_NEAR(above, target * n, 2) << "scale " << scale << " target " << target;
    }
  }
}

TEST(ControllerShift, RateScalesTheStep) {
  std::vector<float> a = Differences(1000, 0.1, 1.0), b = a;
  EXPECT_DOUBLE_EQ(ControllerShift(a, 0.3, 0.25), 0.25 * ControllerShift(b, 0.3, 1.0));
}

TEST(ControllerShift, Ends) {
  std::vector<float> none;
  EXPECT_EQ(ControllerShift(none, 0.1, 1.0), 0);
  EXPECT_EQ(ControllerShift(none, 1.0, 1.0), 0);
  // All rows: the lowest difference goes to kAllMargin, and is left alone beyond it.
  std::vector<float> low = {-0.25f, 2.0f};
  EXPECT_DOUBLE_EQ(ControllerShift(low, 1.0, 1.0), 0.75);
  std::vector<float> far = {-5.0f, 2.0f};
  EXPECT_DOUBLE_EQ(ControllerShift(far, 1.0, 1.0), 1.0);
  std::vector<float> high = {0.6f, 2.0f};
  EXPECT_DOUBLE_EQ(ControllerShift(high, 1.0, 1.0), 0.0);
  // No row: the highest difference goes to 0, which does not attend.
  std::vector<float> few = {-0.25f, 0.5f};
  EXPECT_DOUBLE_EQ(ControllerShift(few, 0.0, 1.0), -0.5);
}

Stream ThreeSequences() { return Stream::FromSegments({{0, 0, 4, 0}, {1, 4, 5, 7}, {2, 5, 9, 2}}); }

std::vector<int32_t> Values(const at::Tensor& t) {
  return {t.data_ptr<int32_t>(), t.data_ptr<int32_t>() + t.numel()};
}

TEST(Stream, PositionsFollowTheSegments) {
  EXPECT_EQ(Values(ThreeSequences().positions_N), (Layers{0, 1, 2, 3, 7, 2, 3, 4, 5}));
  EXPECT_EQ(Stream::FromSegments({}).num_rows(), 0);
  EXPECT_THROW(Stream::FromSegments({{0, 0, 4, 0}, {1, 5, 6, 0}}), std::logic_error);
}

TEST(Plan, FlagsRoundTrip) {
  const Rng rng(3, RngPurpose::kTest);
  for (int64_t n : {1, 2, 9, 100}) {
    for (const double share : {0.0, 0.3, 1.0}) {
      std::vector<uint8_t> flags(n);
      for (int64_t i = 0; i < n; ++i) flags[i] = rng.Uniform(i) < share;
      Plan plan;
      SetRows(flags, &plan);
      EXPECT_EQ(RoutedFlags(plan), flags);
      EXPECT_EQ(plan.all_routed, std::count(flags.begin(), flags.end(), 1) == n);
      EXPECT_FALSE(plan.weight_N.defined());
      if (!plan.all_routed) {
        EXPECT_EQ(plan.rows_R.numel() + plan.bypass_rows.numel(), n);
      }
    }
  }
}

TEST(Plan, RoutedSegmentsAndPositions) {
  const Stream stream = ThreeSequences();
  Plan plan;
  SetRows({1, 0, 0, 1, 0, 0, 1, 1, 0}, &plan);
  const auto segments = RoutedSegments(stream, plan);
  ASSERT_EQ(segments.size(), 2u);  // sequence 1 routed nothing
  EXPECT_EQ(segments[0].begin, 0);
  EXPECT_EQ(segments[0].end, 2);
  EXPECT_EQ(segments[0].sequence, 0);
  EXPECT_EQ(segments[1].begin, 2);
  EXPECT_EQ(segments[1].end, 4);
  EXPECT_EQ(segments[1].sequence, 2);
  EXPECT_EQ(Values(RoutedPositions(stream, plan)), (Layers{0, 3, 3, 4}));
  EXPECT_EQ(plan.NumRouted(), 4);

  const auto all = RoutedSegments(stream, Plan{});
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[2].begin, 5);
  EXPECT_EQ(all[2].end, 9);

  Plan none;
  SetRows(std::vector<uint8_t>(9, 0), &none);
  EXPECT_TRUE(RoutedSegments(stream, none).empty());
  EXPECT_EQ(none.NumRouted(), 0);
}

}  // namespace
}  // namespace detour::routing
