// The parity ladder on the user's machine: every way to compute a model's logits gives the same
// bits.
#include <ATen/ATen.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>

#include "cli/commands.h"
#include "cli/common.h"
#include "convert/load.h"
#include "core/error.h"
#include "core/op_counter.h"
#include "core/rng.h"
#include "core/threads.h"
#include "infer/score.h"
#include "infer/sequence.h"
#include "kernels/reference.h"
#include "model/cost.h"
#include "report/table.h"

namespace detour::cli {

namespace {

using infer::ScoreMode;
using infer::Scores;
using kernels::Simd;
using Sequences = std::vector<std::vector<int32_t>>;

struct Options {
  std::string model, weights = "f32";
  int64_t tokens = 2000;
  int threads = 0;
};

/// Values compared bit by bit, and routing decisions.
struct Comparison {
  int64_t values = 0, different = 0, decisions = 0, flips = 0;

  void AddValues(std::span<const float> got, std::span<const float> expected) {
    values += static_cast<int64_t>(expected.size());
    different += std::abs(std::ssize(expected) - std::ssize(got));
    for (size_t i = 0; i < std::min(got.size(), expected.size()); ++i) {
      different += std::bit_cast<uint32_t>(got[i]) != std::bit_cast<uint32_t>(expected[i]);
    }
  }

  void AddSequence(const Scores& got, size_t got_idx, const Scores& expected, size_t idx) {
    AddValues(got.logits[got_idx], expected.logits[idx]);
    for (size_t l = 0; l < expected.routes[idx].size(); ++l) {
      const std::vector<uint8_t>& a = got.routes[got_idx][l].routed;
      const std::vector<uint8_t>& b = expected.routes[idx][l].routed;
      decisions += std::ssize(b);
      for (size_t t = 0; t < b.size(); ++t) flips += a.at(t) != b[t];
    }
  }

  void Add(const Comparison& other) {
    values += other.values;
    different += other.different;
    decisions += other.decisions;
    flips += other.flips;
  }
};

/// The table, filled rung by rung.
class Ladder {
 public:
  void Add(const char* rung, std::string compared, std::string result, bool ok) {
    table_.AddRow({rung, std::move(compared), std::move(result), ok ? "ok" : "FAILED"});
    ++num_rungs_;
    num_failed_ += !ok;
  }
  void Add(const char* rung, std::string compared, const Comparison& c) {
    Add(rung, std::move(compared),
        fmt::format("{} of {} values differ", report::FormatThousands(c.different),
                    report::FormatThousands(c.values)),
        c.different == 0 && c.values > 0);
    routing_.Add(c);
  }
  void Skip(const char* rung, std::string compared, const char* why) {
    table_.AddRow({rung, std::move(compared), why, "skipped"});
  }
  const Comparison& routing() const { return routing_; }
  int num_rungs() const { return num_rungs_; }
  int num_failed() const { return num_failed_; }
  std::string Render() const { return table_.Render(); }

 private:
  report::TextTable table_{{{"rung", report::Align::kLeft},
                            {"compared", report::Align::kLeft},
                            {"result", report::Align::kRight},
                            {"", report::Align::kLeft}}};
  Comparison routing_;
  int num_rungs_ = 0, num_failed_ = 0;
};

/// `total` random ids in sequences of about half of what is left, down to single tokens.
Sequences RandomSequences(const model::ModelConfig& config, int64_t total) {
  const Rng rng(1, RngPurpose::kTest);
  Sequences sequences;
  int64_t drawn = 0;
  while (drawn < total) {
    std::vector<int32_t> ids(
        std::min<int64_t>((total - drawn + 1) / 2, config.max_position_embeddings));
    for (int32_t& id : ids) id = static_cast<int32_t>(rng.Below(drawn++, config.vocab_size));
    sequences.push_back(std::move(ids));
  }
  return sequences;
}

std::vector<float> RandomFloats(int64_t n, uint32_t which) {
  const Rng rng(2, RngPurpose::kTest, which);
  std::vector<float> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(2 * rng.Uniform(i) - 1);
  return values;
}

std::vector<Simd> Targets() {
  std::vector<Simd> targets = {Simd::kAvx2};
  try {
    kernels::SetSimd(Simd::kAvx512);
    targets.push_back(Simd::kAvx512);
  } catch (const Error&) {
  }
  kernels::SetSimd(Simd::kAuto);
  return targets;
}

constexpr int64_t kKernelRows = 7;  // no multiple of any tile

Comparison CompareGemm(const ops::Matrix& matrix) {
  const kernels::PackedMatrix& w = matrix.Packed();
  const int64_t m = w.num_outputs(), k = w.num_inputs();
  const std::vector<float> x = RandomFloats(kKernelRows * k, 1);
  std::vector<float> got(kKernelRows * m), expected(kKernelRows * m);
  if (kernels::IsQuantized(w.format())) {
    const int64_t num_blocks = (k + kernels::kQuantBlock - 1) / kernels::kQuantBlock;
    std::vector<kernels::QuantBlock> blocks(m * num_blocks);
    for (int64_t i = 0; i < m; ++i) w.CopyBlocks(i, blocks.data() + i * num_blocks);
    kernels::reference::GemmQuant(x.data(), k, kKernelRows, blocks.data(), w.format(), m, k,
                                  nullptr, expected.data(), m);
  } else {
    std::vector<float> rows(m * k);
    for (int64_t i = 0; i < m; ++i) w.CopyRow(i, rows.data() + i * k);
    kernels::reference::Gemm(x.data(), k, kKernelRows, rows.data(), m, k, nullptr, expected.data(),
                             m);
  }
  Comparison c;
  for (const Simd simd : Targets()) {
    kernels::SetSimd(simd);
    kernels::Gemm(x.data(), k, kKernelRows, w, nullptr, got.data(), m);
    c.AddValues(got, expected);
  }
  return c;
}

Comparison CompareRmsNorm(const model::Model& model) {
  const int64_t d = model.config.hidden_size;
  const auto eps = static_cast<float>(model.config.rms_norm_eps);
  const std::vector<float> x = RandomFloats(kKernelRows * d, 2);
  std::vector<float> got(x.size()), expected(x.size());
  kernels::reference::RmsNorm(x.data(), kKernelRows, d, ops::F32(model.norm), eps, expected.data(),
                              nullptr);
  Comparison c;
  for (const Simd simd : Targets()) {
    kernels::SetSimd(simd);
    kernels::RmsNorm(x.data(), kKernelRows, d, ops::F32(model.norm), eps, got.data(), nullptr);
    c.AddValues(got, expected);
  }
  return c;
}

Comparison CompareAttend(const model::ModelConfig& config) {
  constexpr int64_t kKeys = 101;
  const kernels::KvLayout layout{config.num_kv_heads, config.head_dim, false};
  const int64_t kv_width = config.num_kv_heads * config.head_dim;
  const int64_t q_width = config.num_heads * config.head_dim;
  const std::vector<float> q = RandomFloats(kKernelRows * q_width, 3);
  const std::vector<float> k = RandomFloats(kKeys * kv_width, 4);
  const std::vector<float> v = RandomFloats(kKeys * kv_width, 5);
  infer::LayerCache cache(layout);
  const ops::KvStore::Pages pages = cache.Extend(0, kKeys);
  kernels::WriteKvRows(layout, pages.pages, 0, kKeys, k.data(), kv_width, v.data(), kv_width,
                       nullptr);
  const kernels::AttendSegment segment{pages.pages, 0, kKernelRows, kKeys - kKernelRows + 1};
  const float scale = 1 / std::sqrt(static_cast<float>(config.head_dim));
  std::vector<float> got(q.size()), expected(q.size());
  kernels::reference::Attend(layout, config.num_heads, scale, q.data(), q_width, {&segment, 1},
                             expected.data(), q_width, nullptr);
  Comparison c;
  for (const Simd simd : Targets()) {
    kernels::SetSimd(simd);
    kernels::Attend(layout, config.num_heads, scale, q.data(), q_width, {&segment, 1}, got.data(),
                    q_width, nullptr);
    c.AddValues(got, expected);
  }
  return c;
}

Comparison Compare(const Scores& got, const Scores& expected) {
  Comparison c;
  for (size_t b = 0; b < expected.logits.size(); ++b) c.AddSequence(got, b, expected, b);
  return c;
}

void AddKernelRungs(const model::Model& model, Ladder* ladder) {
  Comparison gemm;
  const model::LayerWeights& w = model.layers.front();
  const model::FfnWeights& ffn = w.experts.empty() ? w.ffn : w.experts.front();
  for (const ops::Matrix* matrix :
       {&w.q, &w.k, &w.v, &w.o, &ffn.gate, &ffn.up, &ffn.down, &model.head}) {
    gemm.Add(CompareGemm(*matrix));
  }
  ladder->Add("kernels", "Gemm = scalar reference, each SIMD target", gemm);
  ladder->Add("", "RmsNorm = scalar reference", CompareRmsNorm(model));
  ladder->Add("", "Attend = scalar reference", CompareAttend(model.config));
  kernels::SetSimd(Simd::kAuto);
}

void AddMachineRungs(const model::Model& model, const Sequences& sequences, const Scores& full,
                     Ladder* ladder) {
  if (Targets().size() == 2) {
    kernels::SetSimd(Simd::kAvx2);
    const Scores avx2 = Score(model, sequences, ScoreMode::kFull);
    kernels::SetSimd(Simd::kAvx512);
    ladder->Add("SIMD", "AVX2 = AVX-512", Compare(avx2, Score(model, sequences, ScoreMode::kFull)));
    kernels::SetSimd(Simd::kAuto);
  } else {
    ladder->Skip("SIMD", "AVX2 = AVX-512", "this CPU has AVX2 only");
  }
  const int threads = NumThreads();
  // What `full` was not computed with.
  SetNumThreads(threads == 1 ? 2 : 1);
  const Scores other = Score(model, sequences, ScoreMode::kFull);
  SetNumThreads(threads);
  ladder->Add("threads", fmt::format("1 = {} threads", std::max(2, threads)), Compare(other, full));
}

void AddModeRungs(const model::Model& model, const Sequences& sequences, const Scores& full,
                  Ladder* ladder) {
  ladder->Add("modes", "full = one token at a time",
              Compare(Score(model, sequences, ScoreMode::kIncremental), full));
  ladder->Add("", "full = chunks of 7",
              Compare(Score(model, sequences, ScoreMode::kChunked, 7), full));
  ladder->Add("", "full = chunks of 64",
              Compare(Score(model, sequences, ScoreMode::kChunked, 64), full));
}

/// Each sequence alone against the batch, counting what is executed against the formula.
void AddBatchRungs(const model::Model& model, const Sequences& sequences, const Scores& full,
                   Ladder* ladder, std::string* counted, bool* counted_equal) {
  const size_t n = sequences.size();
  Comparison alone;
  double executed = 0, formula = 0;
  for (size_t b = 0; b < n; ++b) {
    GlobalOpCounter().Reset();
    const Scores one = Score(model, {sequences[b]}, ScoreMode::kFull);
    executed += static_cast<double>(GlobalOpCounter().Total());
    formula +=
        ForwardFlops(model.config, std::ssize(sequences[b]), one.rows, model::Counting::kCausal)
            .Total();
    alone.AddSequence(one, 0, full, b);
  }
  *counted = fmt::format("{} and {} FLOP", report::FormatThousands(static_cast<int64_t>(executed)),
                         report::FormatThousands(static_cast<int64_t>(formula)));
  *counted_equal = executed == formula;
  ladder->Add("batch", "each sequence alone = ragged batch", alone);
  const Scores backwards =
      Score(model, Sequences(sequences.rbegin(), sequences.rend()), ScoreMode::kFull);
  Comparison reversed;
  for (size_t b = 0; b < n; ++b) reversed.AddSequence(backwards, n - 1 - b, full, b);
  ladder->Add("", "reversed order = ragged batch", reversed);
}

/// Feeds each sequence up to its middle, then other tokens, takes those back, feeds the true ones.
void AddTruncateRung(const model::Model& model, const Sequences& sequences, const Scores& full,
                     Ladder* ladder) {
  const at::NoGradGuard no_grad;
  infer::RaggedCache cache(model.config);
  Comparison c;
  for (size_t b = 0; b < sequences.size(); ++b) {
    const std::span<const int32_t> ids = sequences[b];
    const auto sequence = static_cast<int32_t>(b);
    const int64_t half = std::ssize(ids) / 2;
    if (half > 0) Feed(model, cache, sequence, ids.first(half), 0);
    const std::span<const int32_t> rest = ids.subspan(half);
    const std::vector<int32_t> others(rest.rbegin(), rest.rend());
    Feed(model, cache, sequence, others, half);
    cache.Truncate(sequence, half);
    const at::Tensor logits = Logits(model, Feed(model, cache, sequence, rest, half));
    c.AddValues({ops::F32(logits), static_cast<size_t>(logits.numel())},
                std::span(full.logits[b]).subspan(half * model.config.vocab_size));
  }
  ladder->Add("cache", "truncate and feed again = full", c);
  for (size_t b = 0; b < sequences.size(); ++b) cache.Remove(static_cast<int32_t>(b));
  ladder->Add("", "all sequences removed: bytes left", report::FormatThousands(cache.bytes()),
              cache.bytes() == 0);
}

void AddRoutingRungs(const Scores& full, Ladder* ladder) {
  double margin = 1;
  for (const auto& routes : full.routes) {
    for (size_t r = 0; r < routes.size(); ++r) {
      for (size_t i = 0; i < routes[r].probs.size() && full.ways[r] == 2; i += 2) {
        margin = std::min(margin, std::abs(routes[r].probs[i] - 0.5));
      }
    }
  }
  const Comparison& c = ladder->routing();
  if (c.decisions == 0) {
    ladder->Skip("routing", "decisions that flipped in any rung", "no routed layers");
    return;
  }
  ladder->Add("routing", "decisions that flipped in any rung",
              fmt::format("{} of {}, least |p - 0.5| {:.2e}", report::FormatThousands(c.flips),
                          report::FormatThousands(c.decisions), margin),
              c.flips == 0);
}

void Verify(const Options& options) {
  ApplyRuntimeOptions({.threads = options.threads});
  const model::Model model = convert::LoadModel(options.model, ServingWeights(options.weights));
  const Sequences sequences = RandomSequences(model.config, options.tokens);
  fmt::print("{}: method {}, {} parameters; {} random tokens in {} sequences; {}, {} threads\n",
             options.model, MethodName(model.config),
             report::FormatCount(static_cast<double>(model::ParameterCount(model.config))),
             report::FormatThousands(options.tokens), sequences.size(), kernels::SimdName(),
             NumThreads());
  fflush(stdout);
  const Scores full = Score(model, sequences, ScoreMode::kFull);
  Ladder ladder;
  AddKernelRungs(model, &ladder);
  AddMachineRungs(model, sequences, full, &ladder);
  AddModeRungs(model, sequences, full, &ladder);
  std::string counted;
  bool counted_equal = false;
  AddBatchRungs(model, sequences, full, &ladder, &counted, &counted_equal);
  AddTruncateRung(model, sequences, full, &ladder);
  ladder.Add("operations", "counted where executed = formula", counted, counted_equal);
  AddRoutingRungs(full, &ladder);
  fmt::print("{}", ladder.Render());
  if (ladder.num_failed() > 0) {
    Fail("verify", "{} of {} rungs failed: results on this machine depend on how they are computed",
         ladder.num_failed(), ladder.num_rungs());
  }
  fmt::print("all {} rungs hold\n", ladder.num_rungs());
}

}  // namespace

void AddVerifyCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand(
      "verify", "Check on this machine that every way to run a model gives the same bits");
  sub->add_option("model", options->model, "Model directory or .gguf")->required();
  sub->add_option("--tokens", options->tokens, "Random tokens, over all sequences")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  AddWeightsOption(*sub, &options->weights);
  sub->add_option("--threads", options->threads, "Threads; 0: as many as the machine has")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  sub->footer(
      "Exit code 1 if any rung fails.\nExample:\n  detour verify tests/golden/dtrnet_k32_ragged");
  sub->callback([options] { Verify(*options); });
}

}  // namespace detour::cli
