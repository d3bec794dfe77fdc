#include <ATen/ATen.h>

#include <CLI/CLI.hpp>
#include <memory>

#include "cli/commands.h"
#include "cli/common.h"
#include "convert/load.h"
#include "infer/score.h"
#include "io/atomic.h"
#include "io/safetensors.h"

namespace detour::cli {

namespace {

struct Options {
  std::string model, tokens, out, mode = "full";
  int64_t chunk = 64;
  model::ExitRule exit;
  std::string weights = "f32";
  RuntimeOptions runtime;
};

template <typename T>
std::span<const std::byte> Bytes(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

void Logits(const Options& options) {
  ApplyRuntimeOptions(options.runtime);
  const model::Model model = convert::LoadModel(options.model, ServingWeights(options.weights));
  const io::SafetensorsFile file = io::SafetensorsFile::Open(options.tokens);
  const std::vector<int64_t> shape = file.Get("input_ids").shape;
  if (shape.empty() || shape.size() > 2) {
    Fail("logits", "{}: input_ids: expected [B,T] or [T], got {} dimensions", options.tokens,
         shape.size());
  }
  const int64_t num_sequences = shape.size() == 2 ? shape[0] : 1, seq_len = shape.back();
  const std::vector<int32_t> ids = file.ReadI32("input_ids");
  std::vector<int32_t> lengths(num_sequences, static_cast<int32_t>(seq_len));
  if (file.Has("lengths")) lengths = file.ReadI32("lengths");
  if (static_cast<int64_t>(lengths.size()) != num_sequences) {
    Fail("logits", "{}: lengths: expected {} values, got {}", options.tokens, num_sequences,
         lengths.size());
  }
  std::vector<std::vector<int32_t>> sequences;
  for (int64_t b = 0; b < num_sequences; ++b) {
    if (lengths[b] < 0 || lengths[b] > seq_len) {
      Fail("logits", "{}: lengths[{}]: expected 0..{}, got {}", options.tokens, b, seq_len,
           lengths[b]);
    }
    sequences.emplace_back(ids.begin() + b * seq_len, ids.begin() + b * seq_len + lengths[b]);
  }
  const infer::Scores scores = infer::Score(model, sequences, infer::ParseScoreMode(options.mode),
                                            options.chunk, options.exit);

  const int64_t vocab = model.config.vocab_size;
  std::vector<float> logits(num_sequences * seq_len * vocab);
  for (int64_t b = 0; b < num_sequences; ++b) {
    std::copy(scores.logits[b].begin(), scores.logits[b].end(),
              logits.begin() + b * seq_len * vocab);
  }
  const size_t num_routers = scores.routers.size();
  std::vector<std::vector<float>> probs(num_routers);
  std::vector<std::vector<uint8_t>> routed(num_routers);
  std::vector<io::TensorToWrite> tensors = {
      {"logits", io::DType::kF32, {num_sequences, seq_len, vocab}, Bytes(logits)}};
  for (size_t i = 0; i < num_routers; ++i) {
    const int64_t ways = scores.ways[i];
    probs[i].resize(num_sequences * seq_len * ways);
    routed[i].resize(num_sequences * seq_len);
    for (int64_t b = 0; b < num_sequences; ++b) {
      const infer::Scores::Route& r = scores.routes[b][i];
      std::copy(r.probs.begin(), r.probs.end(), probs[i].begin() + b * seq_len * ways);
      std::copy(r.routed.begin(), r.routed.end(), routed[i].begin() + b * seq_len);
    }
    const std::string prefix = scores.routers[i].name + ".";
    tensors.push_back({prefix + "router_probs",
                       io::DType::kF32,
                       {num_sequences, seq_len, ways},
                       Bytes(probs[i])});
    tensors.push_back(
        {prefix + "routed", io::DType::kU8, {num_sequences, seq_len}, Bytes(routed[i])});
  }
  io::AtomicFile out(options.out);
  io::WriteSafetensors(out.path(), tensors);
  out.Commit();
}

}  // namespace

void AddLogitsCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand(
      "logits", "Logits and routing decisions of given tokens, to compare engines");
  sub->add_option("-m,--model", options->model,
                  "Hugging Face directory, one of the public DTRNet code, ours, or .gguf")
      ->required();
  sub->add_option("--tokens", options->tokens,
                  "safetensors with input_ids int32 [B,T] or [T], optional lengths int32 [B]")
      ->required();
  sub->add_option("--out", options->out, "safetensors to write")->required();
  sub->add_option("--mode", options->mode,
                  "full, incremental or chunked: three ways to the same bits")
      ->capture_default_str();
  sub->add_option("--chunk", options->chunk, "Tokens per forward pass in mode chunked")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  AddExitOptions(*sub, &options->exit);
  AddWeightsOption(*sub, &options->weights);
  AddRuntimeOptions(*sub, &options->runtime);
  sub->footer(
      "Example:\n  detour logits --model out/dtrnet/latest --tokens ids.safetensors --out "
      "logits.safetensors --mode incremental");
  sub->callback([options] { Logits(*options); });
}

}  // namespace detour::cli
