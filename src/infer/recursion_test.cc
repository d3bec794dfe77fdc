// The recursion method in the engine: shared weights, spans over several layers, what is refused.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <set>

#include "core/error.h"
#include "core/rng.h"
#include "eval/batch.h"
#include "infer/score.h"
#include "model/model.h"
#include "ops/rows.h"
#include "train/step.h"

namespace detour::infer {
namespace {

eval::Batch BatchOf(const std::vector<int64_t>& lengths) {
  const Rng rng(5, RngPurpose::kTest);
  std::vector<routing::Segment> segments;
  int64_t rows = 0;
  for (const int64_t n : lengths) {
    segments.push_back({static_cast<int32_t>(segments.size()), rows, rows + n, 0});
    rows += n;
  }
  std::vector<int32_t> ids(rows);
  for (int64_t i = 0; i < rows; ++i) ids[i] = static_cast<int32_t>(rng.Below(i, 67));
  return {at::tensor(ids, at::kInt), at::Tensor(),
          routing::Stream::FromSegments(std::move(segments)), 0};
}

/// A model of four layers, its causal rules settled.
model::Model ModelOf(const std::vector<int32_t>& layers, const char* choice,
                     const char* causal = "bce") {
  model::Model m = model::AllocateModel(model::ParseConfig({{"vocab_size", 67},
                                                            {"hidden_size", 40},
                                                            {"intermediate_size", 56},
                                                            {"num_hidden_layers", 4},
                                                            {"num_attention_heads", 4},
                                                            {"initializer_range", 0.15},
                                                            {"routing",
                                                             {{"method", "recursion"},
                                                              {"layers", layers},
                                                              {"recursions", 2},
                                                              {"alpha", 0.7},
                                                              {"choice", choice},
                                                              {"causal", causal}}}},
                                                           "test"));
  InitializeWeights(m, 11);
  train::SettleShares(m, {BatchOf({90, 90})}, 1);
  return m;
}

/// The walk of the layers by hand, and every recursion combined where it ends.
TEST(Recursion, IsTheFormula) {
  for (const char* choice : {"expert", "token"}) {
    const model::Model m = ModelOf({0, 1, 2, 3}, choice);
    const eval::Batch batch = BatchOf({30, 14});
    const at::NoGradGuard no_grad;
    std::vector<routing::LayerPlans> plans;
    std::vector<at::Tensor> states;
    Forward(m, batch.ids_N, batch.stream, {.plans = &plans, .states = &states});
    at::Tensor x = ops::Embed(m.embed, batch.ids_N), first = x;
    for (const int32_t begin : {0, 2}) {
      const at::Tensor start = x;
      const at::Tensor taken = FlagTensor(plans[begin].layer).unsqueeze(1);
      for (const int32_t l : {begin, begin + 1}) {
        EXPECT_TRUE(at::equal(FlagTensor(plans[l].layer).unsqueeze(1), taken));
        const routing::Plan& plan = plans[l].layer;
        const routing::Stream inner = batch.stream.Select(plan.RoutedRows());
        routing::Plan every;
        at::Tensor y = Mixer(m, m.layers[l - begin], ops::GatherRows(x, plan.RoutedRows()), inner,
                             every, nullptr);
        y = Ffn(m, m.layers[l - begin], y, every);
        x = ops::ReplaceRows(x, plan.RoutedRows(), y);
      }
      // g F(H) + H; with token choice g F(F(H¹)) + H¹ for those that take both, F(H¹) on the way.
      at::Tensor ends = taken, from = start;
      const at::Tensor& weight =
          plans[std::string(choice) == "token" ? 0 : begin].layer.span_weight_N;
      if (std::string(choice) == "token") {
        from = first;
        if (begin == 0) ends = 1 - FlagTensor(plans[2].layer).unsqueeze(1);
      }
      x = at::where(ends.gt(0), from + weight.unsqueeze(1) * x, x);
      EXPECT_GT(weight.std().item<float>(), 0.01f);
      const double scale = x.abs().max().item<double>();
      EXPECT_LE((states[begin + 1] - x).abs().max().item<double>(), 1e-5 * scale)
          << choice << begin;
    }
  }
}

TEST(Recursion, AnExitRuleIsRefused) {
  const model::Model m = ModelOf({1, 2}, "expert");
  const model::ExitRule rule{model::ExitRule::Kind::kMargin, 0.5, 0};
  EXPECT_THROW(Score(m, {{1, 2}}, ScoreMode::kFull, 64, rule), Error);
}

TEST(Recursion, WithoutACausalRuleItIsNotServed) {
  const model::Model m = ModelOf({1, 2}, "expert", "none");
  EXPECT_THROW(Score(m, {{1, 2}}, ScoreMode::kFull), Error);
  const eval::Batch batch = BatchOf({9});
  const at::NoGradGuard no_grad;
  Forward(m, batch.ids_N, batch.stream, {.mode = routing::Mode::kTeacherForced});
}

TEST(Recursion, SharedWeightsAreOneTensorAlsoAfterAVisitorReplacedThem) {
  model::Model m = ModelOf({0, 1, 2, 3}, "token");
  std::set<std::string> names;
  ForEachTensor(m, [&](const std::string& name, at::Tensor& t) {
    EXPECT_TRUE(names.insert(name).second) << name;
    t = t.clone();
  });
  for (const int32_t l : {0, 1}) {
    const model::LayerWeights &a = m.layers[l], &b = m.layers[l + 2];
    EXPECT_TRUE(a.input_norm.is_same(b.input_norm));
    EXPECT_TRUE(a.q.weight.is_same(b.q.weight));
    EXPECT_TRUE(a.ffn.down.weight.is_same(b.ffn.down.weight));
    EXPECT_EQ(&a.o.Packed(), &b.o.Packed());
  }
  EXPECT_TRUE(names.count("model.layers.1.mlp.up_proj.weight"));
  EXPECT_FALSE(names.count("model.layers.2.mlp.up_proj.weight"));
  EXPECT_TRUE(names.count("model.layers.0.recursion_router.weight"));
}

}  // namespace
}  // namespace detour::infer
