#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "core/error.h"
#include "core/op_counter.h"
#include "train/config.h"
#include "train/schedule.h"
#include "train/step.h"

namespace detour::train {
namespace {

TEST(Schedule, LearningRate) {
  TrainConfig c;
  c.lr = 1.0;
  c.min_lr = 0.1;
  c.warmup_steps = 10;
  EXPECT_DOUBLE_EQ(LearningRate(c, 0, 110), 0.1);
  EXPECT_DOUBLE_EQ(LearningRate(c, 9, 110), 1.0);
  EXPECT_DOUBLE_EQ(LearningRate(c, 60, 110), 0.55);
  EXPECT_NEAR(LearningRate(c, 109, 110), 0.1, 1e-3);
  c.lr_schedule = "wsd";
  c.decay_ratio = 0.2;
  EXPECT_DOUBLE_EQ(LearningRate(c, 80, 110), 1.0);
  EXPECT_DOUBLE_EQ(LearningRate(c, 99, 110), 0.55);
}

TEST(Schedule, TheControllerFollowsTheLearningRate) {
  TrainConfig c;
  c.warmup_steps = 10;
  c.min_lr = 0;
  c.controller_rate = 0.1;
  EXPECT_DOUBLE_EQ(ControllerRate(c, 10, 100), 1.0);
  EXPECT_DOUBLE_EQ(ControllerRate(c, 99, 100), 0.1);
  c.target_share = 0.2;
  c.share_ramp = 0.5;
  EXPECT_DOUBLE_EQ(TargetShare(c, {}, 0, 100), 1.0);
  EXPECT_DOUBLE_EQ(TargetShare(c, {}, 25, 100), 0.6);
  EXPECT_DOUBLE_EQ(TargetShare(c, {}, 50, 100), 0.2);
}

TEST(Schedule, TheTargetMayBeAScheduleAlone) {
  TrainConfig c;
  EXPECT_EQ(TargetShare(c, {}, 10, 100), 0);
  const Schedules schedules = ParseSchedules({"target_share: 0.9->0.2 linear 0..0.5"});
  EXPECT_DOUBLE_EQ(TargetShare(c, schedules, 0, 100), 0.9);
  EXPECT_DOUBLE_EQ(TargetShare(c, schedules, 100, 100), 0.2);
  c.target_share = 0.5;
  EXPECT_DOUBLE_EQ(TargetShare(c, schedules, 25, 100), 0.55);
}

TEST(Schedule, Texts) {
  const auto s =
      ParseSchedules({"temperature: 5->1 linear", "aux_loss_coeff: 0 -> 5 sine 0.5..1",
                      "routed_layers: 0->4 constant 0.25..1", "capacity: 1->0.2 cosine"});
  EXPECT_DOUBLE_EQ(s.at("temperature").At(50, 100), 3);
  EXPECT_DOUBLE_EQ(s.at("aux_loss_coeff").At(50, 100), 0);
  EXPECT_NEAR(s.at("aux_loss_coeff").At(75, 100), 5 * std::sqrt(0.5), 1e-12);
  EXPECT_DOUBLE_EQ(s.at("aux_loss_coeff").At(100, 100), 5);
  EXPECT_DOUBLE_EQ(s.at("routed_layers").At(24, 100), 0);
  EXPECT_DOUBLE_EQ(s.at("routed_layers").At(25, 100), 4);
  EXPECT_NEAR(s.at("capacity").At(50, 100), 0.6, 1e-12);
  for (const char* bad : {"temperature", "heat: 1->2 linear", "capacity: 1-2 linear",
                          "capacity: 1->2 round", "capacity: 1->2 linear 0.5..0.2",
                          "capacity: 1->x linear", "capacity: 1->2 linear 0..2", ""}) {
    EXPECT_THROW(ParseSchedules({bad}), Error) << bad;
  }
  EXPECT_THROW(ParseSchedules({"capacity: 1->2 linear", "capacity: 1->2 linear"}), Error);
}

TEST(SettleShares, EveryLayerHitsTheTargetToTheRow) {
  const model::ModelConfig config =
      model::ParseConfig({{"vocab_size", 600},
                          {"hidden_size", 64},
                          {"intermediate_size", 96},
                          {"num_hidden_layers", 4},
                          {"num_attention_heads", 2},
                          {"initializer_range", 0.2},
                          {"routing", {{"method", "dtrnet"}, {"layout", "all"}}}},
                         "test");
  model::Model m = model::AllocateModel(config);
  InitializeWeights(m, 3);
  std::vector<eval::Batch> batches;
  for (int b = 0; b < 3; ++b) {
    eval::Batch batch;
    batch.ids_N = at::arange(200 * b, 200 * b + 200, at::kInt);  // no token twice: no ties
    batch.stream = routing::Stream::FromSegments({{0, 0, 200, 0}});
    batches.push_back(batch);
  }
  SettleShares(m, batches, 0.5);
  for (const double target : {0.05, 0.5, 0.95, 1.0}) {
    const int64_t before = GlobalOpCounter().Total();
    SettleShares(m, batches, target);
    const int64_t settling = GlobalOpCounter().Total() - before;
    std::vector<int64_t> routed(config.num_layers);
    for (const eval::Batch& batch : batches) {
      const at::NoGradGuard no_grad;
      std::vector<routing::LayerPlans> plans;
      Forward(m, batch.ids_N, batch.stream, {.plans = &plans});
      for (int l = 0; l < config.num_layers; ++l) routed[l] += plans[l].mixer.NumRouted();
    }
    for (const int64_t rows : routed) EXPECT_EQ(rows, std::llround(target * 600)) << target;
    // Each layer twice, once with the share before; not once for every gate above it.
    const int64_t forward = GlobalOpCounter().Total() - before - settling;
    EXPECT_LE(settling, target == 1.0 ? 2.1 * forward : 3 * forward) << target;
  }
}

}  // namespace
}  // namespace detour::train
