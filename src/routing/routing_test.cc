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
  EXPECT_EQ(LayoutLayers("middle", 5), (Layers{1, 2, 3}));
  EXPECT_EQ(LayoutLayers("middle", 2), Layers{});
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

TEST(ControllerMove, TakesUpASteadyDrift) {
  const int64_t n = 4096;
  const std::vector<float> logits = Differences(n, 0.1, 0.0);
  const auto share_after = [&](double integral, double rate, int steps) {
    double bias = 0, drift = 0, share = 0;
    for (int step = 0; step < steps; ++step) {
      bias += 0.2;  // what training adds
      std::vector<float> shifted(n);
      for (int64_t i = 0; i < n; ++i) shifted[i] = static_cast<float>(logits[i] + bias);
      share =
          static_cast<double>(std::ranges::count_if(shifted, [](float d) { return d > 0; })) / n;
      bias += ControllerMove(shifted, 0.1, rate, integral, &drift);
    }
    return share;
  };
  EXPECT_GT(share_after(0, 1.0, 60), 0.7);
  EXPECT_NEAR(share_after(0.25, 1.0, 60), 0.1, 0.01);
  EXPECT_NEAR(share_after(0.25, 0.1, 400), 0.1, 0.01);
  double drift = 0.3;
  std::vector<float> few = {-0.25f, 0.5f};
  EXPECT_DOUBLE_EQ(ControllerMove(few, 1.0, 1.0, 0.5, &drift), 0.75);
  EXPECT_EQ(drift, 0);
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

/// The routers of a recursion over layers 1 to 6 (three recursions of two layers), on rows of width
/// 2 that stay the same from layer to layer.
class RecursionRouters {
 public:
  explicit RecursionRouters(Json options) {
    options["method"] = "recursion";
    config_ = ParseRouting(options, "test", 8);
    for (int32_t l : config_.layers) {
      routers_.push_back(
          std::move(FindMethod("recursion").make(config_, {2, 50, 8, 1e-5}, l).front()));
    }
  }

  /// Sets the weights of layer `l`'s router.
  void SetWeights(int32_t l, const std::vector<float>& weights) {
    const at::NoGradGuard no_grad;
    routers_[l - 1]->ForEachTensor([&](const std::string& name, at::Tensor& t) {
      if (name == "recursion_router.weight") t.copy_(at::tensor(weights).view(t.sizes()));
    });
  }

  std::vector<LayerPlans> Decide(const at::Tensor& x_ND, const Stream& stream, Mode mode,
                                 const std::vector<LayerPlans>* replay = nullptr) const {
    std::vector<LayerPlans> plans(8);
    for (int32_t l : config_.layers) {
      plans[l].layer = routers_[l - 1]->Decide({x_ND, x_ND, stream},
                                               {.mode = mode,
                                                .layer = l,
                                                .replay = replay ? &(*replay)[l].layer : nullptr,
                                                .made = &plans});
    }
    return plans;
  }

  Router& router(int32_t l) { return *routers_[l - 1]; }

 private:
  RoutingConfig config_;
  std::vector<std::unique_ptr<Router>> routers_;
};

std::vector<int32_t> Taken(const std::vector<LayerPlans>& plans, int32_t l) {
  return Values(plans[l].layer.RoutedRows());
}

/// Two documents of six and three rows; column 0 is their order, column 1 the reverse.
const Stream kTwoDocuments = Stream::FromSegments({{0, 0, 6, 0}, {0, 6, 9, 0}});
at::Tensor RisingRows() {
  at::Tensor x = at::empty({9, 2});
  for (int64_t n = 0; n < 9; ++n) {
    x[n][0] = 0.5 * (static_cast<double>(n) - 3.5);
    x[n][1] = 0.5 * (3.5 - static_cast<double>(n));
  }
  return x;
}

TEST(Recursion, ExpertsChooseAmongThoseBefore) {
  RecursionRouters routers(Json::object());
  routers.SetWeights(1, {1, 0});
  routers.SetWeights(3, {1, 0});
  routers.SetWeights(5, {0, 1});  // likes what recursion 1 left out
  const at::Tensor x = RisingRows();
  const auto plans = routers.Decide(x, kTwoDocuments, Mode::kTrain);
  for (const int32_t l : {1, 2}) {
    EXPECT_EQ(Taken(plans, l), (Layers{0, 1, 2, 3, 4, 5, 6, 7, 8}));
  }
  for (const int32_t l : {3, 4}) EXPECT_EQ(Taken(plans, l), (Layers{2, 3, 4, 5, 7, 8}));
  for (const int32_t l : {5, 6}) EXPECT_EQ(Taken(plans, l), (Layers{2, 3, 7}));
  for (const int32_t l : {1, 3, 5}) {
    ASSERT_EQ(plans[l].layer.deep.size(), 1u);
    EXPECT_EQ(plans[l].layer.deep[0].num_layers, 2);
    EXPECT_EQ(Values(plans[l].layer.deep[0].rows), Taken(plans, l));
    EXPECT_TRUE(plans[l + 1].layer.deep.empty());
    const at::Tensor g = 0.1 * at::sigmoid(x.select(1, l == 5 ? 1 : 0));
    EXPECT_LT((plans[l].layer.span_weight_N - g).abs().max().item<double>(), 1e-7);
  }
  // Mean cross-entropy of the rows asked: six of them, of nine.
  const at::Tensor z = x.select(1, 1).index_select(0, plans[3].layer.rows_R);
  const at::Tensor y = at::tensor(std::vector<float>{1, 1, 0, 0, 1, 0});
  EXPECT_NEAR(plans[5].layer.penalty.item<double>() / 9,
              1e-3 * (at::softplus(z) - y * z).mean().item<double>(), 1e-9);
  EXPECT_FALSE(plans[1].layer.penalty.defined());
}

TEST(Recursion, TheCausalRuleIsAlsoNested) {
  RecursionRouters routers(Json::object());
  routers.SetWeights(3, {1, 0});
  routers.SetWeights(5, {0, 1});
  const auto plans = routers.Decide(RisingRows(), kTwoDocuments, Mode::kInfer);
  EXPECT_EQ(Taken(plans, 2), (Layers{0, 1, 2, 3, 4, 5, 6, 7, 8}));
  EXPECT_EQ(Taken(plans, 4), (Layers{4, 5, 6, 7, 8}));
  EXPECT_TRUE(Taken(plans, 6).empty());  // its score is positive on the others only
  EXPECT_FALSE(routers.router(1).ShiftBias(0));
  EXPECT_FALSE(routers.router(4).ShiftBias(0));
  EXPECT_TRUE(routers.router(5).ShiftBias(1.1));
  const auto shifted = routers.Decide(RisingRows(), kTwoDocuments, Mode::kInfer);
  EXPECT_EQ(Taken(shifted, 6), (Layers{4, 5}));
  EXPECT_DOUBLE_EQ(routers.router(4).ServingShare(0.1), 2.0 / 3);
}

TEST(Recursion, TokensChooseTheirDepth) {
  RecursionRouters routers({{"choice", "token"}, {"z_loss_coeff", 0.5}});
  // Logits 0, 2 x0, 2 x0 + x1 … of depth 1, 2, 3: negative rows 1, small ones 3, large ones 2.
  routers.SetWeights(1, {0, 0, 2, 0, 1.5, -0.25});
  at::Tensor x = RisingRows();
  x.select(1, 1).fill_(-1);
  for (const Mode mode : {Mode::kTrain, Mode::kInfer, Mode::kTeacherForced}) {
    const auto plans = routers.Decide(x, kTwoDocuments, mode);
    const at::Tensor logits =
        at::stack({at::zeros({9}), 2 * x.select(1, 0), 1.5 * x.select(1, 0) + 0.25}, 1);
    const at::Tensor depth = logits.argmax(1) + 1;
    for (int32_t l = 1; l < 7; ++l) {
      const at::Tensor rows = at::nonzero(depth > (l - 1) / 2).squeeze(1).to(at::kInt);
      EXPECT_EQ(Taken(plans, l), Values(rows.contiguous())) << l;
    }
    const Plan& plan = plans[1].layer;
    const at::Tensor p = at::softmax(logits, 1);
    EXPECT_LT((plan.span_weight_N - std::get<0>(p.max(1))).abs().max().item<double>(), 1e-6);
    ASSERT_EQ(plan.deep.size(), 3u);
    EXPECT_EQ(plan.deep[2].num_layers, 6);
    EXPECT_EQ(Values(plan.deep[0].rows), (Layers{0, 1, 2, 3}));
    EXPECT_EQ(Values(plan.deep[2].rows), (Layers{4}));
    EXPECT_EQ(plan.choices.size(), mode == Mode::kTrain ? 3u : 0u);
    // A replay of parts of the rows.
    std::vector<LayerPlans> part;
    for (const LayerPlans& l : plans) part.push_back(SliceRows(l, 6, 9));
    const at::Tensor tail = x.slice(0, 6, 9).contiguous();
    const auto again = routers.Decide(tail, Rows(3), mode, &part);
    EXPECT_EQ(Values(again[1].layer.deep[1].rows), Values(part[1].layer.deep[1].rows));
    EXPECT_EQ(Taken(again, 5), Taken(part, 5));
  }
}

TEST(Recursion, ControlsDrawADepth) {
  for (const char* choice : {"expert", "token"}) {
    RecursionRouters routers({{"choice", choice}, {"decider", "every_nth"}, {"alpha", 0.3}});
    const auto plans = routers.Decide(at::zeros({9, 2}), Rows(9), Mode::kInfer);
    EXPECT_EQ(Taken(plans, 2).size(), 9u);
    EXPECT_EQ(Taken(plans, 4), (Layers{0, 1, 3, 4, 6, 7}));
    EXPECT_EQ(Taken(plans, 6), (Layers{0, 3, 6}));
    EXPECT_FLOAT_EQ(plans[1].layer.span_weight_N[0].item<float>(), 0.3f);
    RecursionRouters random({{"choice", choice}, {"decider", "random"}});
    const auto drawn = random.Decide(at::zeros({900, 2}), Rows(900), Mode::kInfer);
    // Five standard deviations.
    EXPECT_NEAR(std::ssize(Taken(drawn, 3)), 600, 5 * std::sqrt(900 * 2 / 9.0));
    EXPECT_NEAR(std::ssize(Taken(drawn, 5)), 300, 5 * std::sqrt(900 * 2 / 9.0));
  }
}

}  // namespace
}  // namespace detour::routing
