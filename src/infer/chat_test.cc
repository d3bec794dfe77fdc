#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstring>

#include "core/rng.h"
#include "infer/answer_text.h"
#include "infer/prefix.h"
#include "infer/score.h"
#include "ops/attention.h"

namespace detour::infer {
namespace {

constexpr int32_t kVocab = 67;

model::Model ModelOf(Json extra) {
  Json config = {{"vocab_size", kVocab},       {"hidden_size", 64},
                 {"intermediate_size", 64},    {"num_hidden_layers", 4},
                 {"num_attention_heads", 2},   {"num_key_value_heads", 1},
                 {"initializer_range", 0.15},  {"max_position_embeddings", 1024},
                 {"tie_word_embeddings", true}};
  config.update(extra);
  model::Model m = model::AllocateModel(model::ParseConfig(config, "test"));
  InitializeWeights(m, 5);
  return m;
}

std::vector<int32_t> Ids(uint64_t seed, int64_t n) {
  const Rng rng(seed, RngPurpose::kTest);
  std::vector<int32_t> ids(n);
  for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(rng.Below(i, kVocab));
  return ids;
}

/// Logits of the last token, without a cache.
std::vector<float> Fresh(const model::Model& m, const std::vector<int32_t>& ids) {
  const Scores scores = Score(m, {ids}, ScoreMode::kFull);
  return {scores.logits[0].end() - m.config.vocab_size, scores.logits[0].end()};
}

void ExpectFresh(const model::Model& m, PrefixCache& cache, const std::vector<int32_t>& ids) {
  const at::Tensor logits = cache.Next(ids);
  const std::vector<float> expected = Fresh(m, ids);
  ASSERT_EQ(logits.numel(), std::ssize(expected));
  EXPECT_EQ(0, std::memcmp(logits.data_ptr<float>(), expected.data(), expected.size() * 4));
  EXPECT_EQ(cache.num_tokens(), std::ssize(ids));
}

/// Sequences that go on, end differently, fall back by little and by much, and repeat.
void WalkPrefixes(const model::Model& m, bool goes_back_far) {
  PrefixCache cache(m, 48);
  std::vector<int32_t> ids = Ids(1, 200);
  ExpectFresh(m, cache, ids);
  EXPECT_EQ(cache.tokens_run(), 200);
  ids.push_back(3);
  ExpectFresh(m, cache, ids);
  EXPECT_EQ(cache.tokens_run(), 201);
  ExpectFresh(m, cache, ids);  // the same again: the last token runs
  EXPECT_EQ(cache.tokens_run(), 202);
  const std::vector<int32_t> more = Ids(2, 120);
  ids.resize(190);
  ids.back() = (ids.back() + 1) % kVocab;
  ids.insert(ids.end(), more.begin(), more.end());
  ExpectFresh(m, cache, ids);
  EXPECT_EQ(cache.tokens_run(), 202 + 121);
  ids[20] = (ids[20] + 1) % kVocab;  // back by 290
  int64_t run = cache.tokens_run();
  ExpectFresh(m, cache, ids);
  EXPECT_EQ(cache.tokens_run() - run, goes_back_far ? 290 : 310);
  ids[0] = (ids[0] + 1) % kVocab;
  ids.resize(5);
  ExpectFresh(m, cache, ids);
  // Stopped after a chunk, and taken up where it was left.
  ids = Ids(3, 100);
  int calls = 0;
  run = cache.tokens_run();
  EXPECT_FALSE(cache.Next(ids, [&] { return ++calls < 2; }).defined());
  EXPECT_EQ(cache.tokens_run() - run, 48);
  ExpectFresh(m, cache, ids);
  EXPECT_EQ(cache.tokens_run() - run, 100);
  cache.Clear();
  EXPECT_EQ(cache.bytes(), 0);
  ExpectFresh(m, cache, ids);
}

TEST(PrefixCache, EqualsAnEmptyCacheToTheBit) {
  WalkPrefixes(ModelOf(Json::object()), true);
  WalkPrefixes(ModelOf({{"routing", {{"method", "dtrnet"}, {"layout", "bilayer"}}}}), true);
  WalkPrefixes(ModelOf({{"routing", {{"method", "mod"}, {"layout", "bilayer"}}}}), true);
  WalkPrefixes(ModelOf({{"routing", {{"method", "blocks"}, {"layout", "bilayer"}}}}), true);
}

TEST(PrefixCache, StartsAfreshWhereAWindowMovedOn) {
  WalkPrefixes(
      ModelOf(
          {{"routing",
            {{"method", "dtrnet"}, {"layout", "bilayer"}, {"bypass", "window"}, {"window", 32}}}}),
      false);
  WalkPrefixes(ModelOf({{"model_type", "mistral"}, {"sliding_window", 32}}), false);
}

TEST(PrefixCache, CountsWhoAttends) {
  const model::Model m = ModelOf({{"routing", {{"method", "dtrnet"}, {"layout", "bilayer"}}}});
  const std::vector<int32_t> ids = Ids(7, 150);
  PrefixCache cache(m, 64);
  cache.Next(ids);
  const Scores scores = Score(m, {ids}, ScoreMode::kFull);
  std::vector<int64_t> expected(4, 150);
  for (size_t r = 0; r < scores.routers.size(); ++r) {
    const auto& routed = scores.routes[0][r].routed;
    expected[scores.routers[r].layer] = std::count(routed.begin(), routed.end(), 1);
  }
  EXPECT_EQ(cache.attended_by_layer(), expected);
}

TEST(AnswerText, AnUnfinishedCharacterIsMarkedOrLeftOut) {
  const std::vector<std::string> stop = {"END"};
  for (const bool mark : {true, false}) {
    AnswerText text(&stop);
    EXPECT_EQ(text.Push("a EN"), "a ");
    EXPECT_EQ(text.Push("\xE4\xB8"), "");
    EXPECT_EQ(text.Finish(mark), mark ? "EN\uFFFD" : "EN");
  }
  AnswerText text(&stop);
  EXPECT_EQ(text.Push("ok E"), "ok ");
  EXPECT_EQ(text.Push("NDless"), "");
  EXPECT_TRUE(text.stopped());
  EXPECT_EQ(text.Finish(), "");
}

}  // namespace
}  // namespace detour::infer
