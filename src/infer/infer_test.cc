#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/error.h"
#include "core/rng.h"
#include "infer/ragged_cache.h"
#include "infer/sampler.h"
#include "infer/score.h"
#include "infer/sequence.h"
#include "io/safetensors.h"
#include "report/memory.h"

namespace detour::infer {
namespace {

const std::string kGolden = std::string(DETOUR_SOURCE_DIR) + "/tests/golden/";

model::ModelConfig Shape(const char* layout, int64_t num_layers) {
  return model::ParseConfig({{"vocab_size", 50},
                             {"hidden_size", 64},
                             {"intermediate_size", 64},
                             {"num_hidden_layers", num_layers},
                             {"num_attention_heads", 4},
                             {"num_key_value_heads", 2},
                             {"head_dim", 32},
                             {"max_position_embeddings", 32768},
                             {"routing", {{"method", "dtrnet"}, {"layout", layout}}}},
                            "test");
}

bool IsRouted(const model::ModelConfig& c, int32_t l) {
  return HasRouter(c, l, routing::Site::kMixer);
}

/// Positions [begin, end) as a forward pass would write them; every `stride`-th attends in routed
/// layers.
void Write(const RaggedCache& cache, const model::ModelConfig& c, int32_t sequence, int64_t begin,
           int64_t end, int64_t stride) {
  std::vector<float> kv(c.num_kv_heads * c.head_dim, 1.0f);
  for (int32_t l = 0; l < c.num_layers; ++l) {
    std::vector<int32_t> positions;
    for (int64_t p = begin; p < end; ++p) {
      if (!IsRouted(c, l) || p % stride == 0) positions.push_back(static_cast<int32_t>(p));
    }
    const auto n = std::ssize(positions);
    const ops::KvStore::Pages pages = cache.stores()[l]->Extend(sequence, n);
    kernels::WriteKvRows(cache.layer(l).layout(), pages.pages, pages.first_entry, n, kv.data(), 0,
                         kv.data(), 0, positions.data());
  }
}

TEST(RaggedCache, ResidentMemoryIsTheBytesReported) {
  const model::ModelConfig c = Shape("bilayer", 6);
  const int64_t length = 32768;
  RaggedCache cache(c);
  Write(cache, c, 9, 0, 64, 10);  // the code's own first touches
  cache.Remove(9);
  const int64_t before = report::ExactRssBytes();
  // Piecewise and interleaved with a short sequence, as serving does.
  for (int64_t p = 0; p < length; p += 256) {
    Write(cache, c, 0, p, p + 256, 10);
    if (p % 4096 == 0) Write(cache, c, 1, p / 256, p / 256 + 16, 10);
  }
  const auto grown = static_cast<double>(report::ExactRssBytes() - before);
  int64_t expected = 0;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    for (const int32_t sequence : {0, 1}) {
      const int64_t entries = cache.layer(l).num_entries(sequence);
      expected += (entries + 15) / 16 * cache.layer(l).layout().PageBytes();
    }
    EXPECT_EQ(cache.layer(l).num_entries(0), IsRouted(c, l) ? (length + 9) / 10 : length);
  }
  EXPECT_EQ(cache.bytes(), expected);
  EXPECT_NEAR(grown / static_cast<double>(cache.bytes()), 1.0, 0.05);

  cache.Remove(0);
  cache.Remove(1);
  EXPECT_EQ(cache.bytes(), 0);
  const auto left = static_cast<double>(report::ExactRssBytes() - before);
  EXPECT_LT(left, 0.02 * static_cast<double>(expected));
}

TEST(RaggedCache, RatioToDenseAtTenPercent) {
  const auto bytes = [](const model::ModelConfig& c) {
    RaggedCache cache(c);
    Write(cache, c, 0, 0, 8192, 10);
    return static_cast<double>(cache.bytes());
  };
  const double dense = bytes(DenseTwin(Shape("all", 8)));
  EXPECT_LE(bytes(Shape("bilayer", 8)), 0.56 * dense);
  EXPECT_LE(bytes(Shape("all", 8)), 0.15 * dense);
}

TEST(RaggedCache, TruncateDropsPositionsNotEntries) {
  const model::ModelConfig c = Shape("bilayer", 2);
  RaggedCache cache(c);
  Write(cache, c, 0, 0, 100, 10);  // routed layer: 0, 10, …, 90
  cache.Truncate(0, 51);
  EXPECT_EQ(cache.layer(0).num_entries(0), 51);
  EXPECT_EQ(cache.layer(1).num_entries(0), 6);
  cache.Truncate(0, 50);
  EXPECT_EQ(cache.layer(1).num_entries(0), 5);
  cache.Truncate(0, 1000);
  EXPECT_EQ(cache.layer(0).num_entries(0), 50);
  cache.Truncate(7, 0);  // unknown sequences are empty ones
  cache.Remove(7);
  cache.Truncate(0, 0);
  EXPECT_EQ(cache.bytes(), 0);
}

TEST(RaggedCache, AWindowForgetsWhatDoesNotStay) {
  model::ModelConfig c = Shape("all", 1);
  c.routing[0].options["bypass"] = "window";
  c.routing[0].options["window"] = 100;
  RaggedCache cache(c);
  ops::KvStore& store = *cache.stores()[0];
  const kernels::KvLayout layout = cache.layer(0).layout();
  const std::vector<float> kv(layout.num_kv_heads * layout.head_dim);
  for (int32_t p = 0; p < 8192; ++p) {
    for (ops::KvStore* s : {&store, store.recent()}) {
      if (s == &store && p % 10 != 0) continue;
      const ops::KvStore::Pages pages = s->Extend(0, 1);
      kernels::WriteKvRows(layout, pages.pages, pages.first_entry, 1, kv.data(), 0, kv.data(), 0,
                           &p);
      if (s != &store) s->Forget(0, pages.first_entry - 100 - ops::kRollback);
    }
  }
  EXPECT_EQ(cache.layer(0).num_entries(0), 820);
  EXPECT_GE(cache.layer(0).num_recent(0), 100 + ops::kRollback);
  EXPECT_LT(cache.layer(0).num_recent(0), 100 + ops::kRollback + 2 * kernels::kPageEntries);
  EXPECT_LT(cache.bytes(), 0.15 * 8192 / kernels::kPageEntries * layout.PageBytes());
  cache.Truncate(0, 8192 - ops::kRollback);
  EXPECT_EQ(cache.layer(0).num_entries(0), 813);
  EXPECT_THROW(cache.Truncate(0, 8000), std::logic_error);
  cache.Remove(0);
  EXPECT_EQ(cache.bytes(), 0);
}

/// 10,000 random operations on a layer and on a map of vectors: same entries, same values.
void CheckAgainstMap(bool with_positions) {
  const kernels::KvLayout layout{1, 8, with_positions};
  LayerCache cache(layout);
  struct Entry {
    int32_t position;
    float value;
  };
  std::map<int32_t, std::vector<Entry>> expected;
  std::map<int32_t, float* const*> tables;
  const Rng rng(31, RngPurpose::kTest, with_positions);
  uint64_t draws = 0;
  float value = 0;
  for (int step = 0; step < 10000; ++step) {
    const auto sequence = static_cast<int32_t>(rng.Below(draws++, 6));
    std::vector<Entry>& entries = expected[sequence];
    const uint64_t op = rng.Below(draws++, 10);
    if (op < 6) {
      const auto n = static_cast<int64_t>(rng.Below(draws++, 70));
      const ops::KvStore::Pages pages = cache.Extend(sequence, n);
      tables[sequence] = pages.pages;
      ASSERT_EQ(pages.first_entry, std::ssize(entries));
      for (int64_t i = 0; i < n; ++i) {
        const int32_t gap = with_positions ? static_cast<int32_t>(rng.Below(draws++, 4)) : 0;
        const int32_t position = entries.empty() ? gap : entries.back().position + 1 + gap;
        entries.push_back({position, value});
        const int64_t j = pages.first_entry + i;
        const std::vector<float> kv(8, value++);
        kernels::WriteKv(layout, pages.pages[j / 16], j % 16, kv.data(), kv.data(), position);
      }
    } else if (op < 9) {
      const int64_t end = entries.empty() ? 0 : entries.back().position + 1;
      const auto keep = static_cast<int32_t>(rng.Below(draws++, end + 2));
      cache.Truncate(sequence, keep);
      std::erase_if(entries, [&](const Entry& e) { return e.position >= keep; });
    } else {
      cache.Remove(sequence);
      entries.clear();
    }
    int64_t pages = 0;
    for (const auto& [s, list] : expected) {
      ASSERT_EQ(cache.num_entries(s), std::ssize(list));
      pages += (std::ssize(list) + 15) / 16;
    }
    ASSERT_EQ(cache.bytes(), pages * layout.PageBytes());
    if (step % 50 != 0) continue;
    for (const auto& [s, list] : expected) {
      for (int64_t j = 0; j < std::ssize(list); ++j) {
        const float* page = tables[s][j / 16];
        ASSERT_EQ(page[j % 16], list[j].value);                   // key, first dimension
        ASSERT_EQ(page[8 * 16 + j % 16 * 8 + 7], list[j].value);  // value, last dimension
      }
    }
  }
}

TEST(LayerCache, RandomOperationsDense) { CheckAgainstMap(false); }
TEST(LayerCache, RandomOperationsRouted) { CheckAgainstMap(true); }

using Sequences = std::vector<std::vector<int32_t>>;

/// The golden's tokens, cut to ragged lengths.
Sequences GoldenSequences(const std::string& dir) {
  const auto file = io::SafetensorsFile::Open(dir + "/golden.safetensors");
  const std::vector<int64_t> shape = file.Get("input_ids").shape;
  const std::vector<int32_t> ids = file.ReadI32("input_ids");
  Sequences sequences;
  for (int64_t b = 0; b < shape[0]; ++b) {
    sequences.emplace_back(ids.begin() + b * shape[1], ids.begin() + (b + 1) * shape[1] - 3 * b);
  }
  return sequences;
}

void ExpectSameScores(const Scores& a, const Scores& b) {
  ASSERT_EQ(a.logits.size(), b.logits.size());
  for (size_t s = 0; s < a.logits.size(); ++s) {
    ASSERT_EQ(a.logits[s].size(), b.logits[s].size());
    EXPECT_EQ(memcmp(a.logits[s].data(), b.logits[s].data(), a.logits[s].size() * sizeof(float)),
              0);
    for (size_t l = 0; l < a.routes[s].size(); ++l) {
      EXPECT_EQ(a.routes[s][l].routed, b.routes[s][l].routed);
      EXPECT_EQ(a.routes[s][l].probs, b.routes[s][l].probs);
    }
  }
}

class GoldenModes : public testing::TestWithParam<const char*> {};

TEST_P(GoldenModes, FullIncrementalChunkedAreTheSameBits) {
  const model::Model model = model::LoadModel(kGolden + GetParam());
  const Sequences sequences = GoldenSequences(kGolden + GetParam());
  const Scores full = Score(model, sequences, ScoreMode::kFull);
  ASSERT_FALSE(full.logits[0].empty());
  ExpectSameScores(Score(model, sequences, ScoreMode::kIncremental), full);
  for (const int64_t chunk : {2, 7, 16, 64}) {
    ExpectSameScores(Score(model, sequences, ScoreMode::kChunked, chunk), full);
  }
}

TEST_P(GoldenModes, TruncateIsAsIfNeverSeen) {
  const at::NoGradGuard no_grad;
  const model::Model model = model::LoadModel(kGolden + GetParam());
  const std::vector<int32_t> ids = GoldenSequences(kGolden + GetParam())[0];
  const std::vector<int32_t> wrong(ids.rbegin(), ids.rend());
  const int64_t step = std::max<int64_t>(1, std::ssize(ids) / 20);
  for (int64_t keep = 0; keep < std::ssize(ids); keep += step) {
    RaggedCache straight(model.config), back(model.config);
    const std::vector<int32_t> head(ids.begin(), ids.begin() + keep);
    const std::vector<int32_t> tail(ids.begin() + keep, ids.end());
    if (keep > 0) {
      Feed(model, straight, 0, head, 0);
      Feed(model, back, 0, head, 0);
    }
    Feed(model, back, 0, wrong, keep);
    back.Truncate(0, keep);
    const at::Tensor a = Logits(model, Feed(model, straight, 0, tail, keep));
    const at::Tensor b = Logits(model, Feed(model, back, 0, tail, keep));
    EXPECT_EQ(memcmp(a.data_ptr(), b.data_ptr(), a.numel() * sizeof(float)), 0) << keep;
    EXPECT_EQ(back.bytes(), straight.bytes());
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenModes,
                         testing::Values("dense_k32", "dense_k64", "dense_k128", "dense_long",
                                         "dtrnet_none", "dtrnet_all", "dtrnet_gqa",
                                         "dtrnet_all_layers", "dtrnet_k32_ragged"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Score, RefusesBadInput) {
  const model::Model model = model::LoadModel(kGolden + "dtrnet_gqa");
  const auto vocab = static_cast<int32_t>(model.config.vocab_size);
  EXPECT_THROW(Score(model, {{0, vocab}}, ScoreMode::kFull), Error);
  EXPECT_THROW(Score(model, {{-1}}, ScoreMode::kFull), Error);
  const std::vector<int32_t> longer(model.config.max_position_embeddings + 1, 0);
  EXPECT_THROW(Score(model, {longer}, ScoreMode::kFull), Error);
  EXPECT_THROW(ParseScoreMode("fast"), Error);
}

// --- Sampler

std::vector<float> RandomLogits(int64_t vocab, uint32_t which) {
  const Rng rng(41, RngPurpose::kTest, which);
  std::vector<float> logits(vocab);
  for (int64_t v = 0; v < vocab; ++v) logits[v] = static_cast<float>(2 * rng.Normal(v));
  return logits;
}

/// The definition, one filter after the other on whole distributions, as transformers' processors
/// do it: what is removed has probability 0 and the rest is normalised again.
std::vector<double> Distribution(const std::vector<float>& logits, const std::vector<int32_t>& seen,
                                 const SamplingOptions& o) {
  const size_t vocab = logits.size();
  std::vector<double> p(vocab);
  for (size_t v = 0; v < vocab; ++v) {
    double s = logits[v];
    if (std::count(seen.begin(), seen.end(), static_cast<int32_t>(v)) > 0) {
      s = s < 0 ? s * o.repetition_penalty : s / o.repetition_penalty;
    }
    p[v] = std::exp(s / o.temperature);
  }
  const auto normalise = [&] {
    const double total = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& x : p) x /= total;
  };
  const std::vector<double> scores = p;
  const auto rank = [&](size_t v) {
    return std::count_if(scores.begin(), scores.end(), [&](double x) { return x > scores[v]; });
  };
  if (o.top_k > 0) {
    for (size_t v = 0; v < vocab; ++v) {
      if (rank(v) >= o.top_k) p[v] = 0;
    }
  }
  normalise();
  // A token stays if the more probable ones do not reach top_p without it.
  const std::vector<double> before = p;
  for (size_t v = 0; v < vocab && o.top_p < 1; ++v) {
    double above = 0;
    for (double x : before) above += x > before[v] ? x : 0;
    if (above >= o.top_p) p[v] = 0;
  }
  normalise();
  const double most = *std::max_element(p.begin(), p.end());
  for (double& x : p) {
    if (x < o.min_p * most) x = 0;
  }
  normalise();
  return p;
}

TEST(Sampler, DrawsFromTheDefinedDistribution) {
  constexpr int64_t kVocab = 40, kDraws = 20000;
  const std::vector<SamplingOptions> cases = {
      {.temperature = 1.0},
      {.temperature = 0.7},
      {.temperature = 1.0, .top_k = 5},
      {.temperature = 1.0, .top_p = 0.8},
      {.temperature = 1.0, .min_p = 0.1},
      {.temperature = 1.0, .repetition_penalty = 1.5},
      {.temperature = 1.3, .repetition_penalty = 0.8},
      {.temperature = 0.9, .top_k = 12, .top_p = 0.9, .min_p = 0.05, .repetition_penalty = 1.2},
      {.temperature = 2.0, .top_k = 1000},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    const auto which = static_cast<uint32_t>(i);
    const std::vector<float> logits = RandomLogits(kVocab, which);
    const std::vector<int32_t> seen = {3, 3, 17, 20, 39, 0};
    const std::vector<double> p = Distribution(logits, seen, cases[i]);
    std::vector<int64_t> counts(kVocab);
    for (uint32_t position = 0; position < kDraws; ++position) {
      ++counts[Sample(logits, seen, cases[i], which, position)];
    }
    double chi_square = 0;
    int64_t cells = 0;
    for (int64_t v = 0; v < kVocab; ++v) {
      const double expected = p[v] * kDraws;
      if (expected == 0) {
        EXPECT_EQ(counts[v], 0) << v;
      } else if (expected >= 5) {
        chi_square += (counts[v] - expected) * (counts[v] - expected) / expected;
        ++cells;
      } else {
        EXPECT_LE(counts[v], 25) << v;
      }
    }
    // Five standard deviations of chi-square with `cells` degrees of freedom.
    const auto freedom = static_cast<double>(cells);
    EXPECT_LE(chi_square, freedom + 5 * std::sqrt(2 * freedom));
  }
}

TEST(Sampler, TemperatureZeroIsTheFirstOfTheMostProbable) {
  const std::vector<float> logits = {1.0f, 3.0f, -2.0f, 3.0f};
  EXPECT_EQ(Sample(logits, {}, {.temperature = 0}, 0, 0), 1);
  const std::vector<int32_t> seen = {1};
  EXPECT_EQ(Sample(logits, seen, {.temperature = 0, .repetition_penalty = 2}, 0, 0), 3);
  const std::vector<float> negative = {-1.0f, -1.5f};
  const std::vector<int32_t> first = {0};
  EXPECT_EQ(Sample(negative, first, {.temperature = 0, .repetition_penalty = 2}, 0, 0), 1);
}

TEST(Sampler, TiesOfFiltersGoToTheLowerId) {
  const std::vector<float> logits(10, 0.5f);
  for (uint32_t position = 0; position < 500; ++position) {
    EXPECT_LT(Sample(logits, {}, {.temperature = 1, .top_k = 3}, 0, position), 3);
    EXPECT_LT(Sample(logits, {}, {.temperature = 1, .top_p = 0.35}, 0, position), 4);
  }
}

TEST(Sampler, OneTokenLeft) {
  const std::vector<float> logits = RandomLogits(64, 100);
  const int32_t best = Sample(logits, {}, {.temperature = 0}, 0, 0);
  for (uint32_t position = 0; position < 200; ++position) {
    EXPECT_EQ(Sample(logits, {}, {.temperature = 1, .top_k = 1}, 0, position), best);
    EXPECT_EQ(Sample(logits, {}, {.temperature = 1, .top_p = 1e-9}, 0, position), best);
    EXPECT_EQ(Sample(logits, {}, {.temperature = 1, .min_p = 1}, 0, position), best);
    EXPECT_EQ(Sample(logits, {}, {.temperature = 1e-6}, 0, position), best);
  }
}

TEST(Sampler, DependsOnSeedRequestAndPositionAlone) {
  const std::vector<float> logits = RandomLogits(1000, 7);
  const auto draws = [&](uint64_t seed, uint32_t request, bool backwards) {
    std::vector<int32_t> tokens(200);
    for (uint32_t i = 0; i < 200; ++i) {
      const uint32_t position = backwards ? 199 - i : i;
      tokens[position] = Sample(logits, {}, {.temperature = 1.5, .seed = seed}, request, position);
    }
    return tokens;
  };
  EXPECT_EQ(draws(1, 0, false), draws(1, 0, true));
  EXPECT_NE(draws(1, 0, false), draws(2, 0, false));
  EXPECT_NE(draws(1, 0, false), draws(1, 1, false));
}

TEST(Sampler, RefusesOptionsOutOfRange) {
  CheckSamplingOptions({});
  for (const SamplingOptions& bad :
       {SamplingOptions{.temperature = -1}, SamplingOptions{.temperature = NAN},
        SamplingOptions{.temperature = INFINITY}, SamplingOptions{.top_k = -1},
        SamplingOptions{.top_p = 0}, SamplingOptions{.top_p = 1.1}, SamplingOptions{.top_p = NAN},
        SamplingOptions{.min_p = -0.1}, SamplingOptions{.min_p = 1.5},
        SamplingOptions{.repetition_penalty = 0}, SamplingOptions{.repetition_penalty = NAN}}) {
    EXPECT_THROW(CheckSamplingOptions(bad), Error);
  }
}

}  // namespace
}  // namespace detour::infer
