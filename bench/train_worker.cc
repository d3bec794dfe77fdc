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
#include "routing/controller.h"
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

/// Sets every router's bias so that `share` of the batch's rows attend: layer by layer, since a
/// layer changes the next one's input.
double SetShare(model::Model& model, const eval::Batch& batch, double share) {
  std::vector<routing::Plan> plans;
  for (size_t pass = 0; pass < model.layers.size() + 2; ++pass) {
    const at::NoGradGuard no_grad;
    Forward(model, batch.ids_N, batch.stream, {.plans = &plans});
    for (size_t l = 0; l < plans.size(); ++l) {
      if (!model.layers[l].router) continue;
      std::vector<float> differences;
      const float* p = ops::F32(plans[l].scores_N2);
      for (int64_t n = 0; n < batch.stream.num_rows(); ++n) {
        differences.push_back(std::log(p[2 * n] / p[2 * n + 1]));
      }
      model.layers[l].router->ShiftBias(routing::ControllerShift(differences, share, 1.0));
    }
  }
  Forward(model, batch.ids_N, batch.stream, {.plans = &plans});
  double routed = 0;
  for (int32_t l : model.config.routing.layers) routed += plans[l].NumRouted(batch.stream);
  return routed / (batch.stream.num_rows() * model.config.routing.layers.size());
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
  const double share = SetShare(routed.model, batch, std::stod(argv[4]));
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
