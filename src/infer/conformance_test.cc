// What every method must keep, run over the whole registry and its variants.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <numeric>

#include "core/error.h"
#include "core/op_counter.h"
#include "core/rng.h"
#include "core/threads.h"
#include "infer/generate.h"
#include "infer/ragged_cache.h"
#include "infer/score.h"
#include "infer/sequence.h"
#include "infer/speculate.h"
#include "model/cost.h"
#include "routing/early_exit.h"
#include "routing/registry.h"
#include "train/step.h"

namespace detour::infer {
namespace {

using routing::Site;

struct Variant {
  std::string name;
  Json routing;
  bool exact_gradient = true;  // the estimator's gradient is that of the loss with rows held fixed
  bool can_shift = true;       // a large bias makes every gate take its span with weight 1
};

void PrintTo(const Variant& v, std::ostream* out) { *out << v.routing.dump(); }

Json Recursion(const std::vector<int32_t>& layers, int32_t recursions, const char* choice) {
  return {
      {"method", "recursion"}, {"layers", layers}, {"recursions", recursions},
      {"choice", choice},      {"alpha", 0.7},  // so that a recursion changes what comes after it
      {"z_loss_coeff", 0.01}};
}

std::vector<Variant> Variants() {
  const auto v = [](std::string name, Json routing, bool exact = true, bool shift = true) {
    return Variant{std::move(name), std::move(routing), exact, shift};
  };
  return {
      v("dtrnet", {{"method", "dtrnet"}, {"aux_loss_coeff", 0.1}}),
      v("dtrnet_identity", {{"method", "dtrnet"}, {"bypass", "identity"}}),
      v("dtrnet_identity_all_keys", {{"method", "dtrnet"}, {"bypass", "identity"}, {"kv", "all"}}),
      v("dtrnet_constant", {{"method", "dtrnet"}, {"bypass", "constant"}}),
      v("dtrnet_constant_ste", {{"method", "dtrnet"}, {"bypass", "constant"}, {"estimator", "ste"}},
        false),
      v("dtrnet_scaled", {{"method", "dtrnet"},
                          {"bypass", "constant"},
                          {"value_scale", true},
                          {"estimator", "soft"}}),
      v("dtrnet_ste", {{"method", "dtrnet"}, {"estimator", "ste"}, {"key_gradient", true}}, false),
      v("dtrnet_gumbel", {{"method", "dtrnet"}, {"estimator", "gumbel_ste"}}, false),
      v("dtrnet_soft", {{"method", "dtrnet"}, {"estimator", "soft"}}),
      v("dtrnet_narrow",
        {{"method", "dtrnet"}, {"hidden", 3}, {"budget", "target_l2"}, {"aux_loss_coeff", 0.5}}),
      v("dtrnet_compute", {{"method", "dtrnet"},
                           {"scorer", "linear"},
                           {"budget", "compute"},
                           {"budget_target", 0.01},
                           {"aux_loss_coeff", 0.5}}),
      v("dtrnet_window", {{"method", "dtrnet"}, {"bypass", "window"}, {"window", 9}, {"sink", 2}}),
      v("dtrnet_window_ste",
        {{"method", "dtrnet"}, {"bypass", "window"}, {"window", 20}, {"estimator", "ste"}}, false),
      v("dtrnet_window_soft",
        {{"method", "dtrnet"}, {"bypass", "window"}, {"window", 5}, {"estimator", "soft"}}),
      v("dtrnet_soft_keys", {{"method", "dtrnet"}, {"estimator", "soft"}, {"soft_keys", true}}),
      v("dtrnet_random", {{"method", "dtrnet"}, {"decider", "random"}}, true, false),
      v("dtrnet_every_nth", {{"method", "dtrnet"}, {"decider", "every_nth"}, {"share", 0.3}}, true,
        false),
      v("dtrnet_frequency", {{"method", "dtrnet"}, {"decider", "frequency"}}, true, false),
      v("mod", {{"method", "mod"}, {"capacity", 0.4}}, true, false),
      v("mod_predictor", {{"method", "mod"}, {"capacity", 0.4}, {"causal", "predictor"}}, true,
        false),
      v("mod_random", {{"method", "mod"}, {"decider", "random"}}, true, false),
      v("dllm", {{"method", "dllm"}, {"hidden", 24}, {"layout", "all"}}, false),
      v("dllm_soft_around_moe",
        {{{"method", "dllm"}, {"hidden", 24}, {"estimator", "soft"}},
         {{"method", "moe"}, {"experts", 3}}},
        true, false),
      v("early_exit", {{"method", "early_exit"}, {"max_dropout", 0.8}}, true, false),
      v("blocks", {{"method", "blocks"}, {"block_size", 16}, {"top_k", 2}}, true, false),
      v("blocks_random",
        {{"method", "blocks"}, {"block_size", 16}, {"top_k", 3}, {"decider", "random"}}, true,
        false),
      v("mod_around_blocks",
        {{{"method", "mod"}, {"capacity", 0.7}},
         {{"method", "blocks"}, {"block_size", 16}, {"top_k", 1}}},
        true, false),
      v("mod_around_window",
        {{{"method", "mod"}, {"capacity", 0.7}},
         {{"method", "dtrnet"}, {"bypass", "window"}, {"window", 6}, {"sink", 3}}},
        true, false),
      v("moe", {{"method", "moe"}, {"experts", 4}, {"z_loss_coeff", 0.01}}, true, false),
      v("moe_switch",
        {{"method", "moe"},
         {"experts", 3},
         {"top_k", 1},
         {"normalize", false},
         {"capacity_factor", 1.0},
         {"jitter", 0.01}},
        true, false),
      v("moe_bias",
        {{"method", "moe"},
         {"experts", 4},
         {"top_k", 2},
         {"bias_rate", 0.01},
         {"shared_expert", true},
         {"aux_loss_coeff", 0}},
        true, false),
      v("moe_random", {{"method", "moe"}, {"experts", 4}, {"decider", "random"}}, true, false),
      v("recursion", Recursion({1, 2}, 2, "expert"), true, false),
      v("recursion_pairs", Recursion({0, 1, 2, 3}, 2, "expert"), true, false),
      v("recursion_four", Recursion({0, 1, 2, 3}, 4, "expert"), true, false),
      v("recursion_token", Recursion({1, 2, 3}, 3, "token"), true, false),
      v("recursion_token_pairs", Recursion({0, 1, 2, 3}, 2, "token"), true, false),
      v("recursion_random", {{"method", "recursion"}, {"layers", {1, 2, 3}}, {"decider", "random"}},
        true, false),
      v("recursion_around_dtrnet",
        {Recursion({0, 1, 2, 3}, 2, "expert"), {{"method", "dtrnet"}, {"layers", {1, 3}}}}, true,
        false),
      v("skip", {{"method", "skip"}}, false),
      v("skip_executed", {{"method", "skip"}, {"kv", "executed"}, {"estimator", "prob_gate"}}),
      v("dtrnet_and_moe", {{{"method", "dtrnet"}}, {{"method", "moe"}, {"experts", 3}}}, true,
        false),
      v("mod_and_moe",
        {{{"method", "mod"}, {"capacity", 0.4}}, {{"method", "moe"}, {"experts", 3}}}, true, false),
      v("mod_around_dtrnet", {{{"method", "mod"}, {"capacity", 0.6}}, {{"method", "dtrnet"}}}, true,
        false),
  };
}

model::ModelConfig ConfigOf(const Variant& variant, int64_t head_dim = 32) {
  return model::ParseConfig({{"vocab_size", 67},
                             {"hidden_size", 40},
                             {"intermediate_size", 56},
                             {"num_hidden_layers", 4},
                             {"num_attention_heads", 4},
                             {"num_key_value_heads", 2},
                             {"head_dim", head_dim},
                             {"max_position_embeddings", 512},
                             {"initializer_range", 0.15},
                             {"routing", variant.routing}},
                            variant.name);
}

/// A model whose routers split the rows: random weights, biases settled to about half.
model::Model ModelOf(const Variant& variant, int64_t head_dim = 32) {
  model::Model m = model::AllocateModel(ConfigOf(variant, head_dim));
  InitializeWeights(m, 11);
  std::vector<int64_t> counts(m.config.vocab_size);
  std::iota(counts.begin(), counts.end(), 1);
  for (model::LayerWeights& layer : m.layers) {
    for (const auto& router : layer.routers) {
      if (!router) continue;
      router->SetFrequencies(counts);
      router->ForEachTensor([](const std::string& name, at::Tensor& t) {
        if (name.find("router.bypass_") != std::string::npos)
          t.copy_(at::linspace(-0.3, 0.4, t.numel()));
      });
    }
  }
  return m;
}

std::vector<int32_t> RandomIds(int64_t n, uint32_t key) {
  const Rng rng(5, RngPurpose::kTest, key);
  std::vector<int32_t> ids(n);
  for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(rng.Below(i, 67));
  return ids;
}

eval::Batch BatchOf(const std::vector<int64_t>& lengths) {
  std::vector<int32_t> ids, targets;
  std::vector<routing::Segment> segments;
  for (size_t b = 0; b < lengths.size(); ++b) {
    const auto begin = static_cast<int64_t>(ids.size());
    const std::vector<int32_t> sequence = RandomIds(lengths[b] + 1, static_cast<uint32_t>(b));
    ids.insert(ids.end(), sequence.begin(), sequence.end() - 1);
    targets.insert(targets.end(), sequence.begin() + 1, sequence.end());
    segments.push_back({static_cast<int32_t>(b), begin, begin + lengths[b], 0});
  }
  return {at::tensor(ids, at::kInt), at::tensor(targets, at::kInt),
          routing::Stream::FromSegments(std::move(segments)), 0};
}

model::Model Settled(const Variant& variant, int64_t head_dim = 32) {
  model::Model m = ModelOf(variant, head_dim);
  train::SettleShares(m, {BatchOf({90, 90})}, 0.5);
  return m;
}

void ShiftAll(model::Model& m, double delta) {
  for (model::LayerWeights& layer : m.layers) {
    for (const auto& router : layer.routers) {
      if (!router) continue;
      EXPECT_TRUE(router->ShiftBias(delta));
    }
  }
}

bool SameBits(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() &&
         std::memcmp(ops::F32(a.contiguous()), ops::F32(b.contiguous()), a.numel() * 4) == 0;
}

class Conformance : public testing::TestWithParam<Variant> {};

at::Tensor LogitsOf(const model::Model& m, const eval::Batch& batch,
                    std::vector<routing::LayerPlans>* plans = nullptr) {
  const at::NoGradGuard no_grad;
  return Logits(m, Forward(m, batch.ids_N, batch.stream, {.plans = plans}));
}

TEST_P(Conformance, RoutersSplitTheRows) {
  const model::Model m = Settled(GetParam());
  std::vector<routing::LayerPlans> plans;
  LogitsOf(m, BatchOf({90, 90}), &plans);
  for (const model::RouterId& id : model::Routers(m.config)) {
    const routing::Plan& plan = *PlanOf(plans[id.layer], id.site).plan;
    ASSERT_TRUE(plan.decided());
    // Rows of early_exit skip in training only; blocks chooses keys.
    const bool serves = GetParam().name != "early_exit" && plan.blocks.size == 0;
    if (plan.experts.empty() && serves) {
      EXPECT_GT(plan.NumRouted(), 0) << id.name;
      const bool splits = m.layers[id.layer].router(id.site)->ServingShare(0.5) < 1;
      EXPECT_EQ(plan.NumRouted() < plan.num_rows, splits) << id.name;
    }
  }
}

TEST_P(Conformance, TheControllerReachesAnyShare) {
  model::Model m = ModelOf(GetParam());
  const eval::Batch batch = BatchOf({150, 150});
  for (const double target : {0.05, 0.35, 0.95}) {
    train::SettleShares(m, {batch}, target);
    std::vector<routing::LayerPlans> plans;
    LogitsOf(m, batch, &plans);
    for (const model::RouterId& id : model::Routers(m.config)) {
      routing::Router& router = *m.layers[id.layer].router(id.site);
      const routing::Plan& plan = *PlanOf(plans[id.layer], id.site).plan;
      if (router.num_experts() > 0 || !router.ShiftBias(0)) continue;
      // Tokens that occur twice may tie in the first layers.
      EXPECT_NEAR(plan.NumRouted(), target * router.ServingShare(1) * plan.num_rows,
                  0.01 * plan.num_rows + 6)
          << id.name;
    }
  }
}

TEST_P(Conformance, AllRoutedIsTheDenseModel) {
  if (!GetParam().can_shift) GTEST_SKIP() << "no bias makes this method dense";
  model::Model m = ModelOf(GetParam());
  ShiftAll(m, 200);
  model::Model dense = model::AllocateModel(DenseTwin(m.config));
  InitializeWeights(dense, 11);
  const eval::Batch batch = BatchOf({40, 1, 33});
  EXPECT_TRUE(SameBits(LogitsOf(m, batch), LogitsOf(dense, batch)));
}

TEST_P(Conformance, NoneRoutedWithoutBypassIsNoLayer) {
  const Json& routing = GetParam().routing;
  if (!GetParam().can_shift || routing.is_array() || routing.at("method") == "dtrnet" ||
      routing.at("method") == "moe") {
    GTEST_SKIP() << "has a bypass, or no bias that closes its gates";
  }
  Variant variant = GetParam();
  variant.routing["layout"] = "all";
  if (routing.at("method") == "dllm") variant.routing["reserved"] = 0;
  model::Model m = ModelOf(variant);
  ShiftAll(m, -200);
  const eval::Batch batch = BatchOf({20, 5});
  model::Model empty = ModelOf(variant);
  empty.config.num_layers = 0;
  EXPECT_TRUE(SameBits(LogitsOf(m, batch), LogitsOf(empty, batch)));
}

void ExpectSame(const Scores& a, const Scores& b, size_t row_of_b, size_t row_of_a) {
  EXPECT_TRUE(a.logits[row_of_a] == b.logits[row_of_b]);
  for (size_t r = 0; r < a.routers.size(); ++r) {
    EXPECT_EQ(a.routes[row_of_a][r].routed, b.routes[row_of_b][r].routed) << a.routers[r].name;
    EXPECT_EQ(a.routes[row_of_a][r].probs, b.routes[row_of_b][r].probs) << a.routers[r].name;
  }
}

TEST_P(Conformance, FullIncrementalChunkedBatchedThreadedAreTheSameBits) {
  for (const int64_t head_dim : {32, 64, 128}) {
    const model::Model m = Settled(GetParam(), head_dim);
    std::vector<std::vector<int32_t>> sequences;
    for (const int64_t n : {70, 1, 2, 17, 40}) sequences.push_back(RandomIds(n, 90 + n));
    const Scores full = Score(m, sequences, ScoreMode::kFull);
    const auto same = [&](const Scores& other) {
      for (size_t b = 0; b < sequences.size(); ++b) ExpectSame(full, other, b, b);
    };
    same(Score(m, sequences, ScoreMode::kIncremental));
    for (const int64_t chunk : {3, 16, 33}) same(Score(m, sequences, ScoreMode::kChunked, chunk));
    const std::vector<std::vector<int32_t>> reversed(sequences.rbegin(), sequences.rend());
    const Scores backwards = Score(m, reversed, ScoreMode::kFull);
    for (size_t b = 0; b < sequences.size(); ++b) {
      ExpectSame(full, backwards, sequences.size() - 1 - b, b);
      ExpectSame(full, Score(m, {sequences[b]}, ScoreMode::kFull), 0, b);
    }
    SetNumThreads(1);
    same(Score(m, sequences, ScoreMode::kFull));
    SetNumThreads(2);
    same(Score(m, sequences, ScoreMode::kFull));
  }
}

TEST_P(Conformance, TruncatedCacheIsAsIfNeverSeen) {
  const at::NoGradGuard no_grad;
  const model::Model m = Settled(GetParam());
  const std::vector<int32_t> ids = RandomIds(50, 1), wrong = RandomIds(30, 2);
  const auto feed = [&](RaggedCache& cache, const std::vector<int32_t>& tokens, int64_t from,
                        int64_t to) {
    return Logits(m, Feed(m, cache, 0, std::span(tokens).first(to - from), from));
  };
  for (const int64_t keep : {1, 16, 20}) {
    RaggedCache straight(m.config), back(m.config);
    feed(straight, ids, 0, keep);
    feed(back, ids, 0, keep);
    feed(back, wrong, keep, keep + 30);
    back.Truncate(0, keep);
    EXPECT_EQ(straight.bytes(), back.bytes());
    const std::vector<int32_t> rest(ids.begin() + keep, ids.end());
    EXPECT_TRUE(SameBits(feed(straight, rest, keep, 50), feed(back, rest, keep, 50)));
    back.Remove(0);
    EXPECT_EQ(back.bytes(), 0);
  }
}

TEST_P(Conformance, CostIsWhatIsCounted) {
  model::Model m = Settled(GetParam());
  EXPECT_EQ(model::ParameterCount(m.config), model::CountParameters(m));
  EXPECT_EQ(model::RouterParameterCount(m.config), model::CountParameters(m, true));
  const at::NoGradGuard no_grad;
  const eval::Batch batch = BatchOf({61, 9});
  std::vector<routing::LayerPlans> plans;
  GlobalOpCounter().Reset();
  LogitsOf(m, batch, &plans);
  const model::Flops f =
      ForwardFlops(m.config, batch.stream.num_rows(), RowsOf(m.config, batch.stream, plans),
                   model::Counting::kCausal);
  EXPECT_EQ(static_cast<double>(GlobalOpCounter().Total()), f.Total());
}

TEST_P(Conformance, SaveAndLoadKeepTheBits) {
  model::Model m = Settled(GetParam());
  const std::string dir = testing::TempDir() + "conformance_" + GetParam().name;
  std::filesystem::create_directories(dir);
  SaveModel(m, dir);
  const eval::Batch batch = BatchOf({30, 12});
  EXPECT_TRUE(SameBits(LogitsOf(m, batch), LogitsOf(model::LoadModel(dir), batch)));
}

/// The loss of a step and the gradients, by name.
std::pair<double, std::map<std::string, at::Tensor>> Gradients(
    model::Model& m, const std::vector<eval::Batch>& batches, train::StepOptions options) {
  ForEachTensor(m, [](const std::string&, at::Tensor& t) {
    t.requires_grad_(true);
    t.mutable_grad() = at::Tensor();
  });
  const train::StepResult step = ComputeGradients(m, batches, options);
  std::map<std::string, at::Tensor> grads;
  ForEachTensor(m, [&](const std::string& name, at::Tensor& t) {
    if (t.grad().defined()) grads[name] = t.grad().clone();
  });
  return {step.loss, grads};
}

void ExpectClose(const std::map<std::string, at::Tensor>& a,
                 const std::map<std::string, at::Tensor>& b, double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  double scale = 0;
  for (const auto& [name, t] : a) scale = std::max(scale, t.abs().max().item<double>());
  for (const auto& [name, t] : a) {
    EXPECT_LE((t - b.at(name)).abs().max().item<double>(), tolerance * scale) << name;
  }
}

TEST_P(Conformance, CheckpointingAndMicroBatchesChangeNoGradient) {
  model::Model m = Settled(GetParam());
  const auto [loss, whole] = Gradients(m, {BatchOf({40, 25})}, {.seed = 3, .step = 2});
  const auto [loss2, again] =
      Gradients(m, {BatchOf({40, 25})}, {.activation_checkpointing = true, .seed = 3, .step = 2});
  EXPECT_EQ(loss, loss2);
  ExpectClose(whole, again, 1e-6);
  // The same rows as two micro-batches of one document.
  const eval::Batch joined = BatchOf({40, 25});
  std::vector<eval::Batch> split;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 40}, {40, 65}}) {
    split.push_back({joined.ids_N.slice(0, begin, end).contiguous(),
                     joined.targets_N.slice(0, begin, end).contiguous(),
                     routing::Stream::FromSegments({{0, 0, end - begin, 0}}), begin});
  }
  const auto [loss3, parts] = Gradients(m, split, {.seed = 3, .step = 2});
  EXPECT_NEAR(loss, loss3, 1e-6 * std::abs(loss));
  ExpectClose(whole, parts, 1e-5);
}

TEST_P(Conformance, GradientsAreThoseOfTheLoss) {
  if (!GetParam().exact_gradient) GTEST_SKIP() << "a straight-through gradient is no derivative";
  // Without loss on the decisions themselves: it acts on statistics that count as constants.
  Variant variant = GetParam();
  for (Json* r : variant.routing.is_array()
                     ? std::vector<Json*>{&variant.routing[0], &variant.routing[1]}
                     : std::vector<Json*>{&variant.routing}) {
    const auto options = routing::FindMethod(r->at("method")).options();
    for (const char* key : {"aux_loss_coeff", "z_loss_coeff", "causal_coeff"}) {
      for (const routing::Option& o : options) {
        if (o.key == key) (*r)[key] = 0.0;
      }
    }
  }
  model::Model m = Settled(variant);
  const eval::Batch batch = BatchOf({21, 6});
  std::vector<routing::LayerPlans> plans;
  {
    const at::NoGradGuard no_grad;
    Forward(m, batch.ids_N, batch.stream,
            {.mode = routing::Mode::kTrain, .draw = {3, 2, 0}, .plans = &plans});
  }
  const std::vector<std::vector<routing::LayerPlans>> replay = {plans};
  const train::StepOptions options{.seed = 3, .step = 2, .replay = &replay};
  const auto [loss, grads] = Gradients(m, {batch}, options);
  // Along a random direction in all weights: central differences with rows held fixed.
  double slope = 0, norm = 0;
  std::map<std::string, at::Tensor> direction;
  uint32_t key = 0;
  for (const auto& [name, g] : grads) {
    const Rng rng(9, RngPurpose::kTest, ++key);
    at::Tensor d = at::empty_like(g);
    for (int64_t i = 0; i < d.numel(); ++i) ops::F32(d)[i] = static_cast<float>(rng.Normal(i));
    slope += (g * d).sum(at::kDouble).item<double>();
    norm += g.square().sum(at::kDouble).item<double>();
    direction[name] = d;
  }
  const auto loss_at = [&](double t) {
    ForEachTensor(m, [&](const std::string& name, at::Tensor& w) {
      const at::NoGradGuard no_grad;
      if (direction.count(name)) w.add_(direction.at(name), t);
    });
    const double value = Gradients(m, {batch}, options).first;
    ForEachTensor(m, [&](const std::string& name, at::Tensor& w) {
      const at::NoGradGuard no_grad;
      if (direction.count(name)) w.sub_(direction.at(name), t);
    });
    return value;
  };
  const double h = 2e-4;
  const double differences = (loss_at(h) - loss_at(-h)) / (2 * h);
  EXPECT_NEAR(slope, differences, 0.02 * std::sqrt(norm)) << "|gradient| " << std::sqrt(norm);
}

INSTANTIATE_TEST_SUITE_P(Registry, Conformance, testing::ValuesIn(Variants()),
                         [](const auto& info) { return info.param.name; });

model::Model ExitModel() {
  const Variant variant{"early_exit", {{"method", "early_exit"}}};
  return ModelOf(variant);
}

TEST(EarlyExit, ModesBatchesAndThreadsAreTheSameBits) {
  const model::Model m = ExitModel();
  std::vector<std::vector<int32_t>> sequences;
  for (const int64_t n : {60, 1, 33}) sequences.push_back(RandomIds(n, 70 + n));
  for (const auto& [kind, threshold] :
       {std::pair{model::ExitRule::Kind::kMargin, 0.05}, {model::ExitRule::Kind::kState, 0.7}}) {
    const model::ExitRule exit{kind, threshold, 0};
    const Scores full = Score(m, sequences, ScoreMode::kFull, 64, exit);
    // Some rows stop early, and not all of them.
    double fed = 0;
    for (const model::LayerRows& r : full.rows) fed += r.fed;
    EXPECT_LT(fed, 0.97 * 94 * 4) << threshold;
    EXPECT_GT(fed, 1.03 * 94) << threshold;
    const Scores plain = Score(m, sequences, ScoreMode::kFull);
    EXPECT_NE(full.logits[0], plain.logits[0]);
    EXPECT_EQ(Score(m, sequences, ScoreMode::kIncremental, 64, exit).logits, full.logits);
    EXPECT_EQ(Score(m, sequences, ScoreMode::kChunked, 7, exit).logits, full.logits);
    EXPECT_EQ(Score(m, {sequences[2]}, ScoreMode::kFull, 64, exit).logits[0], full.logits[2]);
  }
  const model::ExitRule never{model::ExitRule::Kind::kMargin, 1.0, 0};
  EXPECT_EQ(Score(m, sequences, ScoreMode::kFull, 64, never).logits,
            Score(m, sequences, ScoreMode::kFull).logits);
  const model::Model routed = ModelOf({"dtrnet", {{"method", "dtrnet"}}});
  EXPECT_THROW(Score(routed, sequences, ScoreMode::kFull, 64, never), Error);
}

TEST(Generate, EndsEachWhenItIsDoneAndAllWhenAsked) {
  const model::Model m = Settled(Variants().front());
  std::vector<Request> requests;
  for (int64_t i = 0; i < 7; ++i) requests.push_back({RandomIds(3 + i, 3), 10 + 5 * (i % 3)});
  const GenerateOptions options{.prefill_chunk = 2, .max_batch = 3};
  const std::vector<RequestResult> all = Generate(m, requests, options, nullptr);
  for (const int64_t steps : {0, 1, 9, 20, 1000}) {
    int64_t done = 0;
    std::map<size_t, RequestResult> ended;
    GenerateEach(m, requests, options,
                 {.on_result = [&](size_t i, RequestResult r) { ended[i] = std::move(r); },
                  .stopping = [&] { return done++ == steps; }});
    EXPECT_EQ(ended.size() == requests.size(), steps == 1000) << steps;
    EXPECT_EQ(ended.empty(), steps == 0);
    for (const auto& [i, r] : ended) {
      const std::vector<int32_t>& expected = all[i].tokens;
      EXPECT_LE(i, ended.size() - 1);  // none was left out before one that began
      ASSERT_LE(r.tokens.size(), expected.size());
      EXPECT_TRUE(std::equal(r.tokens.begin(), r.tokens.end(), expected.begin()));
      EXPECT_EQ(r.finish_reason,
                r.tokens.size() == expected.size() ? all[i].finish_reason : "stopped");
    }
  }
}

TEST(EarlyExit, SpeculationChangesNoToken) {
  // Also of routed models: a draft is a shorter model, whatever its layers decide.
  for (const Variant& variant : Variants()) {
    if (variant.name != "early_exit" && variant.name != "dtrnet" && variant.name != "dllm" &&
        !variant.name.starts_with("recursion")) {
      continue;
    }
    const model::Model m = Settled(variant);
    for (const int64_t length : {1, 20}) {
      const std::vector<int32_t> prompt = RandomIds(length, 3);
      const auto greedy = Generate(m, {{prompt, 40}}, {.sampling = {.temperature = 0}}, nullptr);
      for (const int32_t layers : {1, 3}) {
        for (const int64_t drafted : {1, 5}) {
          SpeculateStats stats;
          const SpeculateResult r = Speculate(
              m, prompt, {.draft_layers = layers, .draft_tokens = drafted, .max_tokens = 40},
              nullptr, &stats);
          EXPECT_EQ(r.tokens, greedy[0].tokens) << variant.name << layers << drafted;
          EXPECT_EQ(r.finish_reason, greedy[0].finish_reason);
          EXPECT_EQ(stats.new_tokens, 40);
          EXPECT_LE(stats.accepted, stats.drafted);
        }
      }
    }
    EXPECT_THROW(Speculate(m, {1}, {.draft_layers = 4}, nullptr, nullptr), Error);
  }
}

TEST(EarlyExit, WeightsOfTheExits) {
  const auto config = routing::ParseRouting(
      {{"method", "early_exit"}, {"exit_scale", 0.5}, {"curriculum", "all"}}, "test", 4);
  // e(l) = 0.5 Σ_{i<=l} i for l < 3: 0, 0.5, 1.5; e(3) = 3 + 0.5 Σ_{i<=2} i = 4.5.
  const auto weights = routing::ExitWeights(config, 4, 0, 10);
  EXPECT_DOUBLE_EQ(weights[1], 0.5 / 6.5);
  EXPECT_DOUBLE_EQ(weights[2], 1.5 / 6.5);
  EXPECT_DOUBLE_EQ(weights[3], 4.5 / 6.5);
  for (const char* curriculum : {"rotational", "gradual", "all"}) {
    const auto c =
        routing::ParseRouting({{"method", "early_exit"}, {"curriculum", curriculum}}, "test", 8);
    for (int64_t step = 0; step < 50; ++step) {
      const auto w = routing::ExitWeights(c, 8, step, 50);
      EXPECT_NEAR(std::accumulate(w.begin(), w.end(), 0.0), 1, 1e-12);
      EXPECT_GT(w.back(), 0);
    }
  }
}

TEST(ConformanceSuite, HasEveryMethod) {
  for (const routing::Method& method : routing::Methods()) {
    const auto variants = Variants();
    EXPECT_TRUE(std::any_of(variants.begin(), variants.end(), [&](const Variant& v) {
      return !v.routing.is_array() && v.routing.at("method") == method.name;
    })) << method.name;
  }
}

}  // namespace
}  // namespace detour::infer
