#include "model/cost.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/op_counter.h"
#include "core/rng.h"
#include "io/atomic.h"
#include "model/model.h"

namespace detour::model {
namespace {

const std::string kSource = DETOUR_SOURCE_DIR;

at::Tensor RandomIds(const ModelConfig& config, int64_t num_tokens) {
  const Rng rng(21, RngPurpose::kTest);
  at::Tensor ids = at::empty({num_tokens}, at::kInt);
  for (int64_t t = 0; t < num_tokens; ++t) {
    ids.data_ptr<int32_t>()[t] = static_cast<int32_t>(rng.Below(t, config.vocab_size));
  }
  return ids;
}

/// Runs one sequence, its plans given or decided, and holds what was executed against the formula.
void ExpectCountedEqualsFormula(const Model& model, int64_t num_tokens,
                                const std::vector<routing::LayerPlans>* replay) {
  const at::NoGradGuard no_grad;
  const auto stream = routing::Stream::FromSegments({{0, 0, num_tokens, 0}});
  std::vector<routing::LayerPlans> plans;
  OpCounter& counter = GlobalOpCounter();
  counter.Reset();
  Logits(model, Forward(model, RandomIds(model.config, num_tokens), stream,
                        {.replay = replay, .plans = &plans}));
  const std::vector<LayerRows> rows = RowsOf(model.config, stream, plans);
  const Flops f = ForwardFlops(model.config, num_tokens, rows, Counting::kCausal);
  EXPECT_EQ(static_cast<double>(counter.attention_flops), f.scores);
  EXPECT_EQ(static_cast<double>(counter.gemm_flops), f.projections + f.mlp + f.router + f.head);
  double visited = 0;
  for (const LayerRows& r : rows) visited += r.visited;
  EXPECT_EQ(static_cast<double>(counter.visited_keys), visited);
}

class GoldenCost : public testing::TestWithParam<const char*> {};

TEST_P(GoldenCost, CountedEqualsFormula) {
  Model model = LoadModel(kSource + "/tests/golden/" + GetParam());
  for (const int64_t n : {1, 17, 48}) {
    SCOPED_TRACE(n);
    ExpectCountedEqualsFormula(model, n, nullptr);
  }
  EXPECT_EQ(ParameterCount(model.config), CountParameters(model));
  EXPECT_EQ(RouterParameterCount(model.config), CountParameters(model, /*routers_only=*/true));
}

INSTANTIATE_TEST_SUITE_P(All, GoldenCost,
                         testing::Values("dense_k32", "dense_k64", "dense_k128", "dense_narrow",
                                         "dtrnet_none", "dtrnet_all", "dtrnet_gqa",
                                         "dtrnet_all_layers", "dtrnet_k32_ragged"),
                         [](const auto& info) { return std::string(info.param); });

ModelConfig RandomShape(bool tied) {
  return ParseConfig({{"vocab_size", 211},
                      {"hidden_size", 72},
                      {"intermediate_size", 100},
                      {"num_hidden_layers", 5},
                      {"num_attention_heads", 6},
                      {"num_key_value_heads", 2},
                      {"head_dim", 20},
                      {"tie_word_embeddings", tied},
                      {"routing", {{"method", "dtrnet"}, {"layers", {0, 2, 3}}}}},
                     "test");
}

TEST(Cost, KnownPlans) {
  for (const bool tied : {false, true}) {
    Model model = AllocateModel(RandomShape(tied));
    InitializeWeights(model, 5);
    EXPECT_EQ(ParameterCount(model.config), CountParameters(model));
    EXPECT_EQ(RouterParameterCount(model.config), CountParameters(model, true));
    const int64_t n = 90;
    const Rng rng(22, RngPurpose::kTest);
    std::vector<routing::LayerPlans> plans(model.layers.size());
    // Layer 0 some rows, layer 2 none, layer 3 all.
    for (const auto& [l, share] : {std::pair{0, 0.3}, {2, 0.0}, {3, 1.0}}) {
      std::vector<uint8_t> flags(n);
      for (int64_t t = 0; t < n; ++t) flags[t] = rng.Uniform(t) < share;
      SetRows(flags, &plans[l].mixer);
    }
    ExpectCountedEqualsFormula(model, n, &plans);
  }
}

TEST(Cost, DenseFullCountingEqualsTorchsFlopCounter) {
  const std::string path = kSource + "/tests/golden/flops/flops.json";
  const Json flops = ParseJson(io::ReadFile(path), path);
  ASSERT_EQ(flops.at("cases").size(), 3u);
  for (const Json& c : flops.at("cases")) {
    SCOPED_TRACE(c.at("name").get<std::string>());
    const ModelConfig config = ParseConfig(c.at("config"), path);
    const Flops f = ForwardFlops(config, c.at("tokens").get<int64_t>(), 1.0, Counting::kFull);
    const Json& by_module = c.at("flops").at("eager").at("by_module");
    EXPECT_EQ(f.Total() * c.at("batch").get<double>(),
              c.at("flops").at("eager").at("total").get<double>());
    EXPECT_EQ(f.head, by_module.at("lm_head").get<double>());
    EXPECT_EQ(f.mlp, config.num_layers * by_module.at("model.layers.0.mlp").get<double>());
    EXPECT_EQ(f.projections + f.scores,
              config.num_layers * by_module.at("model.layers.0.self_attn").get<double>());
  }
}

double RatioToDense(const ModelConfig& config, int64_t num_tokens, Counting counting) {
  return ForwardFlops(config, num_tokens, 0.10, counting).Total() /
         ForwardFlops(DenseTwin(config), num_tokens, 1.0, counting).Total();
}

TEST(Cost, RatiosOfThe360mModel) {
  const ModelConfig config = LoadConfig(kSource + "/configs/dtrnet-360m.json");
  EXPECT_NEAR(RatioToDense(config, 2048, Counting::kCausal), 0.90, 0.005);
  EXPECT_NEAR(RatioToDense(config, 2048, Counting::kFull), 0.85, 0.005);
  EXPECT_NEAR(RatioToDense(config, 20480, Counting::kCausal), 0.67, 0.005);
  EXPECT_NEAR(RatioToDense(config, 20480, Counting::kFull), 0.61, 0.005);
}

TEST(Cost, DenseTwinOfEqualFlops) {
  for (const char* name : {"dtrnet-360m", "dtrnet-1.3b", "demo"}) {
    const ModelConfig c = LoadConfig(kSource + "/configs/" + name + ".json");
    for (const int64_t n : {1024, 20480}) {
      for (const double share : {0.1, 0.5}) {
        const ModelConfig twin = MatchFlops(c, n, share);
        EXPECT_TRUE(twin.routing.empty());
        EXPECT_NEAR(ForwardFlops(twin, n, 1.0, Counting::kCausal).Total() /
                        ForwardFlops(c, n, share, Counting::kCausal).Total(),
                    1, 0.005);
        EXPECT_LE(twin.num_layers, c.num_layers);
      }
    }
    const ModelConfig same = MatchFlops(DenseTwin(c), 2048, 0.1);
    EXPECT_EQ(same.num_layers, c.num_layers);
    EXPECT_EQ(same.intermediate_size, c.intermediate_size);
  }
}

TEST(Cost, RecursionHasItsOwnShares) {
  for (const char* choice : {"expert", "token"}) {
    const ModelConfig c = ParseConfig({{"vocab_size", 211},
                                       {"hidden_size", 72},
                                       {"intermediate_size", 100},
                                       {"num_hidden_layers", 8},
                                       {"num_attention_heads", 6},
                                       {"num_key_value_heads", 2},
                                       {"head_dim", 20},
                                       {"routing", {{"method", "recursion"}, {"choice", choice}}}},
                                      "test");
    const std::vector<LayerRows> rows = RowsAtShare(c, 900, 0.1);
    const std::vector<double> entered = {900, 900, 900, 600, 600, 300, 300, 900};
    for (size_t l = 0; l < entered.size(); ++l) EXPECT_EQ(rows[l].entered, entered[l]);
    const double entry = 2 * 2 * 20 * 4;
    EXPECT_DOUBLE_EQ(KvBytes(c, 900, 0.1), 1800 * entry + 3600 * (entry + 4));
    // Four layers have weights.
    ModelConfig four = DenseTwin(c);
    four.num_layers = 4;
    EXPECT_EQ(ParameterCount(c), ParameterCount(four) + RouterParameterCount(c));
    // θ of three recursions and two biases; W.
    EXPECT_EQ(RouterParameterCount(c), 3 * 72 + (std::string(choice) == "expert" ? 2 : 0));
    Model model = AllocateModel(c);
    InitializeWeights(model, 5);
    ExpectCountedEqualsFormula(model, 90, nullptr);
  }
}

TEST(Cost, KvBytes) {
  const ModelConfig c = RandomShape(false);
  const double entry = 2 * 2 * 20 * 4;
  EXPECT_DOUBLE_EQ(KvBytes(c, 1000, 0.1), 2 * 1000 * entry + 3 * 100 * (entry + 4));
  EXPECT_DOUBLE_EQ(KvBytes(DenseTwin(c), 1000, 0.1), 5 * 1000 * entry);
}

}  // namespace
}  // namespace detour::model
