// Training steps on request, for bench/train.py: reads "dense" or "dtrnet" from standard input,
// runs one step (forward, backward, clip, AdamW at learning rate 0), answers with its seconds. Both
// models have the same shape and see the same tokens.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <chrono>
#include <iostream>
#include <string>

#include "core/op_counter.h"
#include "core/rng.h"
#include "core/threads.h"
#include "model/config.h"
#include "ops/torch_threads.h"
#include "train/step.h"

namespace {

using namespace detour;

struct Candidate {
  model::Model model;
  std::unique_ptr<train::AdamW> optimizer;
};

eval::Batch RandomBatch(const model::ModelConfig& config, int64_t num_sequences, int64_t seq_len) {
  const Rng rng(1, RngPurpose::kTest);
  std::vector<int32_t> ids(num_sequences * seq_len), targets(ids.size());
  std::vector<routing::Segment> segments;
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>(rng.Below(i, config.vocab_size));
    targets[i] = static_cast<int32_t>(rng.Below(i + 1, config.vocab_size));
  }
  for (int32_t b = 0; b < num_sequences; ++b) {
    segments.push_back({b, b * seq_len, (b + 1) * seq_len, 0});
  }
  return {at::tensor(ids, at::kInt), at::tensor(targets, at::kInt),
          routing::Stream::FromSegments(std::move(segments)), 0};
}

/// Share of rows that attend in routed layers.
double MeasuredShare(const model::Model& model, const eval::Batch& batch) {
  const at::NoGradGuard no_grad;
  std::vector<routing::LayerPlans> plans;
  Forward(model, batch.ids_N, batch.stream, {.plans = &plans});
  const std::vector<model::RouterId> routers = model::Routers(model.config);
  double routed = 0;
  for (const model::RouterId& id : routers) {
    routed += static_cast<double>(plans[id.layer].mixer.NumRouted());
  }
  return routed / static_cast<double>(batch.stream.num_rows() * std::ssize(routers));
}

Candidate Make(const model::ModelConfig& config) {
  Candidate c;
  c.model = model::AllocateModel(config);
  InitializeWeights(c.model, 42);
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: train_worker CONFIG SEQ_LEN NUM_SEQUENCES SHARE THREADS\n";
    return 2;
  }
  const model::ModelConfig config = model::LoadConfig(argv[1]);
  SetNumThreads(std::stoi(argv[5]));
  ops::InstallTorchThreads();
  const eval::Batch batch = RandomBatch(config, std::stoll(argv[3]), std::stoll(argv[2]));
  Candidate routed = Make(config), dense = Make(DenseTwin(config));
  train::SettleShares(routed.model, {batch}, std::stod(argv[4]));
  const double share = MeasuredShare(routed.model, batch);
  std::vector<double> flops;
  for (Candidate* c : {&dense, &routed}) {
    GlobalOpCounter().Reset();
    {
      const at::NoGradGuard no_grad;
      Logits(c->model, Forward(c->model, batch.ids_N, batch.stream, {}));
    }
    flops.push_back(static_cast<double>(GlobalOpCounter().Total()));
    c->optimizer = std::make_unique<train::AdamW>(c->model, train::AdamWOptions{});
  }
  fmt::print("{{\"share\": {}, \"dense_flops\": {}, \"routed_flops\": {}}}\n", share, flops[0],
             flops[1]);
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    Candidate& c = line == "dense" ? dense : routed;
    const auto start = std::chrono::steady_clock::now();
    TrainStep(c.model, *c.optimizer, {batch}, {.lr = 0});
    fmt::print("{}\n",
               std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    std::fflush(stdout);
  }
  return 0;
}
