// Models of one shape and several methods that train, read and decode on request, for
// bench/train.py, bench/scale.py and bench/breakeven.py. Weights are random, and the routers'
// biases such that the wanted share of the bench's own tokens is routed. First line out: what each
// model is. Then for each line in, "train NAME", "prefill NAME" or "decode NAME", one line out.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <chrono>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "core/error.h"
#include "core/op_counter.h"
#include "core/rng.h"
#include "core/threads.h"
#include "infer/sequence.h"
#include "model/cost.h"
#include "ops/torch_threads.h"
#include "report/memory.h"
#include "train/config.h"
#include "train/step.h"

namespace {

using namespace detour;

constexpr int64_t kPrefillChunk = 2048, kDecoded = 8;

struct Candidate {
  model::Model model;
  std::unique_ptr<train::AdamW> optimizer;
  std::unique_ptr<infer::RaggedCache> cache;
};

struct Bench {
  eval::Batch batch;
  std::vector<int32_t> ids;  // of one sequence, and the tokens decoded after it
  std::map<std::string, Candidate> candidates;
};

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

eval::Batch RandomBatch(int64_t vocab, int64_t num_sequences, int64_t seq_len) {
  const Rng rng(1, RngPurpose::kTest);
  std::vector<int32_t> ids(num_sequences * seq_len), targets(ids.size());
  std::vector<routing::Segment> segments;
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>(rng.Below(i, vocab));
    targets[i] = static_cast<int32_t>(rng.Below(i + 1, vocab));
  }
  for (int32_t b = 0; b < num_sequences; ++b) {
    segments.push_back({b, b * seq_len, (b + 1) * seq_len, 0});
  }
  return {at::tensor(ids, at::kInt), at::tensor(targets, at::kInt),
          routing::Stream::FromSegments(std::move(segments)), 0};
}

/// One forward pass over the batch: the share of rows that take the routers' spans, FLOPs without
/// and with the head's, and the bytes of the weights.
std::string Facts(const model::Model& model, const eval::Batch& batch) {
  const at::NoGradGuard no_grad;
  const model::ModelConfig& c = model.config;
  std::vector<routing::LayerPlans> plans;
  GlobalOpCounter().Reset();
  Forward(model, batch.ids_N, batch.stream, {.plans = &plans});
  const auto rows = static_cast<double>(batch.stream.num_rows());
  const auto flops = static_cast<double>(GlobalOpCounter().Total());
  const double head = 2.0 * rows * static_cast<double>(c.hidden_size * c.vocab_size);
  double routed = 0;
  const std::vector<model::RouterId> routers = model::Routers(c);
  for (const model::RouterId& id : routers) {
    routed += static_cast<double>(PlanOf(plans[id.layer], id.site).plan->NumRouted());
  }
  const double share = routers.empty() ? 1 : routed / (rows * static_cast<double>(routers.size()));
  return fmt::format(
      "{{\"share\": {}, \"flops\": {}, \"flops_with_head\": {}, \"weight_bytes\": {}}}", share,
      flops, flops + head, 4 * model::ParameterCount(c));
}

/// NAME=METHOD[:LAYOUT[:KEY=VALUE,...]][@SHARE] of a config file; METHOD dense for none.
std::pair<std::string, Candidate> Make(std::string spec, const std::string& config_path,
                                       const eval::Batch& batch, double share) {
  if (const size_t at = spec.find('@'); at != std::string::npos) {
    share = std::stod(spec.substr(at + 1));
    spec.resize(at);
  }
  const size_t equals = spec.find('=');
  if (equals == std::string::npos) Fail("bench.worker", "expected NAME=METHOD..., got '{}'", spec);
  std::istringstream parts(spec.substr(equals + 1));
  train::TrainConfig c;
  c.model_config = config_path;
  std::getline(parts, c.method, ':');
  std::getline(parts, c.layout, ':');
  for (std::string option; std::getline(parts, option, ',');) c.routing.push_back(option);
  Candidate candidate;
  candidate.model = train::InitialModel(c);
  train::SettleShares(candidate.model, {batch}, share);
  return {spec.substr(0, equals), std::move(candidate)};
}

/// Reads the sequence into a new cache.
std::string Prefill(const Bench& bench, Candidate& c) {
  const at::InferenceMode inference;
  const auto length = std::ssize(bench.ids) - kDecoded;
  c.cache.reset();
  report::ResetPeakRss();
  const int64_t before = report::CurrentRssBytes();
  const auto start = std::chrono::steady_clock::now();
  c.cache = std::make_unique<infer::RaggedCache>(c.model.config);
  for (int64_t begin = 0; begin < length; begin += kPrefillChunk) {
    const int64_t n = std::min(kPrefillChunk, length - begin);
    infer::Feed(c.model, *c.cache, 0, std::span(bench.ids).subspan(begin, n), begin);
  }
  const double seconds = SecondsSince(start);
  int64_t kv_bytes = 0;
  for (size_t l = 0; l < c.model.layers.size(); ++l) {
    kv_bytes += c.cache->layer(static_cast<int32_t>(l)).bytes();
  }
  return fmt::format("{{\"seconds\": {}, \"kv_bytes\": {}, \"memory_bytes\": {}}}", seconds,
                     kv_bytes, report::PeakRssBytes() - before);
}

/// Some tokens after the sequence, one by one; the cache is then as before.
std::string Decode(const Bench& bench, Candidate& c) {
  const at::InferenceMode inference;
  const int64_t length = std::ssize(bench.ids) - kDecoded;
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < kDecoded; ++i) {
    const at::Tensor h =
        infer::Feed(c.model, *c.cache, 0, std::span(bench.ids).subspan(length + i, 1), length + i);
    Logits(c.model, h);
  }
  const double seconds = SecondsSince(start) / static_cast<double>(kDecoded);
  c.cache->Truncate(0, length);
  return fmt::format("{{\"seconds\": {}}}", seconds);
}

std::string Train(const Bench& bench, Candidate& c) {
  if (!c.optimizer) c.optimizer = std::make_unique<train::AdamW>(c.model, train::AdamWOptions{});
  const auto start = std::chrono::steady_clock::now();
  TrainStep(c.model, *c.optimizer, {bench.batch}, {.lr = 0});
  return fmt::format("{{\"seconds\": {}}}", SecondsSince(start));
}

void Run(int argc, char** argv) {
  SetNumThreads(std::stoi(argv[5]));
  ops::InstallTorchThreads();
  const int64_t length = std::stoll(argv[2]);
  const double share = std::stod(argv[4]);
  const int64_t vocab = model::LoadConfig(argv[1]).vocab_size;
  Bench bench{.batch = RandomBatch(vocab, std::stoll(argv[3]), length)};
  const Rng rng(1, RngPurpose::kTest);
  for (int64_t n = 0; n < length + kDecoded; ++n) {
    bench.ids.push_back(static_cast<int32_t>(rng.Below(n, vocab)));
  }
  std::string facts;
  for (int i = 6; i < argc; ++i) {
    auto [name, candidate] = Make(argv[i], argv[1], bench.batch, share);
    facts += fmt::format("{}\"{}\": {}", facts.empty() ? "" : ", ", name,
                         Facts(candidate.model, bench.batch));
    bench.candidates[name] = std::move(candidate);
  }
  fmt::print("{{{}}}\n", facts);
  std::fflush(stdout);
  for (std::string what, name; std::cin >> what >> name;) {
    Candidate& c = bench.candidates.at(name);
    fmt::print("{}\n", what == "train"     ? Train(bench, c)
                       : what == "prefill" ? Prefill(bench, c)
                                           : Decode(bench, c));
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) {
    std::cerr << "usage: worker CONFIG LENGTH NUM_SEQUENCES SHARE THREADS "
                 "NAME=METHOD[:LAYOUT[:KEY=VALUE,...]][@SHARE]...\n";
    return 2;
  }
  try {
    Run(argc, argv);
  } catch (const Error& e) {
    std::cerr << "worker: " << e.what() << '\n';
    return 1;
  }
  return 0;
}
