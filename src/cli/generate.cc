#include "infer/generate.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/run_config.h"
#include "cli/signals.h"
#include "convert/load.h"
#include "core/json.h"
#include "data/utf8_stream.h"
#include "infer/answer_text.h"
#include "infer/sequence.h"
#include "infer/speculate.h"
#include "report/memory.h"
#include "report/table.h"
#include "report/terminal.h"

namespace detour::cli {

namespace {

struct Options {
  std::string model, prompts_file;
  std::vector<std::string> prompts, stop;
  int64_t max_tokens = 128;
  bool ignore_eos = false, stats = false, json = false;
  infer::GenerateOptions generate;
  infer::SpeculateOptions speculate{.draft_layers = 0};
  std::string weights = "f32";
  RuntimeOptions runtime;
};

std::vector<std::string> Prompts(const Options& options) {
  std::vector<std::string> prompts = options.prompts;
  if (!options.prompts_file.empty()) {
    const std::string text = ReadInput(options.prompts_file);
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find('\n', begin), text.size());
      if (end > begin) prompts.push_back(text.substr(begin, end - begin));
      begin = end + 1;
    }
  }
  if (prompts.empty()) Fail("generate.prompt", "no prompt: give --prompt TEXT or --prompts FILE");
  return prompts;
}

/// To standard error: a line for people, or one of JSON.
void PrintStats(const infer::GenerateStats& stats, const model::ModelConfig& config,
                const std::vector<infer::RequestResult>& results, bool json) {
  infer::Attendance attendance;
  for (const infer::RequestResult& r : results) {
    attendance.Add(config, r.routed_tokens, r.num_positions);
  }
  const double decode_speed =
      static_cast<double>(stats.decode_tokens) / std::max(stats.decode_seconds, 1e-9);
  if (json) {
    const Json line = {
        {"prompt_tokens", stats.prompt_tokens}, {"prefill_seconds", stats.prefill_seconds},
        {"new_tokens", stats.new_tokens},       {"decode_tokens_per_s", decode_speed},
        {"kv_bytes", stats.peak_kv_bytes},      {"peak_rss_bytes", report::PeakRssBytes()}};
    fmt::print(stderr, "{}\n", line.dump());
    return;
  }
  fmt::print(stderr,
             "prompt {} tokens in {:.2f} s; {} new tokens, {:.1f} tok/s in decode; KV cache {}{}; "
             "peak memory {}\n",
             stats.prompt_tokens, stats.prefill_seconds, stats.new_tokens, decode_speed,
             report::FormatBytes(static_cast<double>(stats.peak_kv_bytes)),
             attendance.pairs > 0 ? fmt::format("; {} of tokens attended in routed layers",
                                                report::FormatPercent(attendance.Share()))
                                  : "",
             report::FormatBytes(static_cast<double>(report::PeakRssBytes())));
}

/// Answers as text, one block each; or one line of JSON each.
void PrintAnswers(const Options& options, const std::vector<std::string>& prompts,
                  const std::vector<infer::Request>& requests,
                  const std::vector<infer::RequestResult>& results,
                  const std::vector<std::string>& texts) {
  for (size_t i = 0; i < prompts.size(); ++i) {
    const infer::RequestResult& r = results[i];
    if (!options.json) {
      fmt::print("=== {} ({})\n{}{}\n", i + 1, r.finish_reason, prompts[i], texts[i]);
      continue;
    }
    const Json line = {{"prompt", prompts[i]},
                       {"text", texts[i]},
                       {"finish_reason", r.finish_reason},
                       {"prompt_tokens", requests[i].prompt},
                       {"tokens", r.tokens},
                       {"routed_tokens_by_layer", r.routed_tokens},
                       {"positions", r.num_positions},
                       {"peak_rss_bytes", report::PeakRssBytes()}};
    fmt::print("{}\n", line.dump(-1, ' ', false, Json::error_handler_t::replace));
  }
}

void PrintStats(const infer::SpeculateStats& stats) {
  fmt::print(stderr,
             "{} new tokens, {:.1f} tok/s in decode; {} of {} drafted tokens accepted ({}), {:.2f} "
             "tokens a pass\n",
             stats.new_tokens, stats.new_tokens / std::max(stats.decode_seconds, 1e-9),
             stats.accepted, stats.drafted,
             report::FormatPercent(static_cast<double>(stats.accepted) /
                                   std::max<double>(static_cast<double>(stats.drafted), 1)),
             static_cast<double>(stats.new_tokens) /
                 std::max<double>(static_cast<double>(stats.passes), 1));
}

/// One request after the other, drafted by the first layers.
std::vector<infer::RequestResult> SpeculateAll(const model::Model& model,
                                               const std::vector<infer::Request>& requests,
                                               const Options& options,
                                               const infer::OnToken& on_token,
                                               infer::SpeculateStats* stats) {
  const infer::GenerateOptions& g = options.generate;
  if (g.sampling.temperature != 0 || g.sampling.repetition_penalty != 1 ||
      g.exit.kind != model::ExitRule::Kind::kNone) {
    Fail("generate.draft",
         "--draft-layers: expected greedy decoding: --temp 0, no --repetition-penalty, no --exit");
  }
  infer::CheckRequests(model.config, requests);
  std::vector<infer::RequestResult> results;
  for (size_t i = 0; i < requests.size(); ++i) {
    infer::SpeculateOptions speculate = options.speculate;
    speculate.max_tokens = requests[i].max_tokens;
    speculate.prefill_chunk = g.prefill_chunk;
    speculate.eos_id = g.eos_id;
    infer::SpeculateResult r = infer::Speculate(
        model, requests[i].prompt, speculate, [&](int32_t t) { return on_token(i, t); }, stats);
    infer::RequestResult& result = results.emplace_back();
    result.num_positions = std::ssize(requests[i].prompt) + std::ssize(r.tokens) - 1;
    result.routed_tokens.assign(model.layers.size(), result.num_positions);
    result.tokens = std::move(r.tokens);
    result.finish_reason = std::move(r.finish_reason);
  }
  return results;
}

void Generate(Options& options) {
  ApplyRuntimeOptions(options.runtime);
  for (const std::string& s : options.stop) {
    if (s.empty()) Fail("generate.options", "--stop: expected a string, got an empty one");
  }
  const std::vector<std::string> prompts = Prompts(options);
  const model::Model model = convert::LoadModel(options.model, ServingWeights(options.weights));
  const auto tokenizer = convert::LoadTokenizer(options.model);
  if (tokenizer->vocab_size() > model.config.vocab_size) {
    Fail("generate", "{}: the tokenizer has {} tokens, the model {}", options.model,
         tokenizer->vocab_size(), model.config.vocab_size);
  }
  if (!options.ignore_eos) options.generate.eos_id = tokenizer->eos_id().value_or(-1);
  std::vector<infer::Request> requests;
  for (const std::string& prompt : prompts) {
    requests.push_back(
        {tokenizer->Encode(prompt, {.add_special_tokens = true}), options.max_tokens});
  }
  InstallStopHandler();
  std::vector<infer::AnswerText> answers(prompts.size(), infer::AnswerText(&options.stop));
  std::vector<std::string> texts(prompts.size());
  const bool stream = prompts.size() == 1 && !options.json;
  const bool screen = isatty(STDOUT_FILENO) != 0;
  const auto emit = [&](size_t request, const std::string& text) {
    if (!stream) {
      texts[request] += text;
      return;
    }
    const std::string shown = screen ? report::Harmless(text) : text;
    std::fwrite(shown.data(), 1, shown.size(), stdout);
    std::fflush(stdout);
  };
  // The prompt is printed with the first token: all checks are behind us then.
  bool echoed = !stream;
  const auto echo = [&] {
    if (!echoed) {
      data::Utf8Stream utf8;
      emit(0, utf8.Push(prompts[0]) + utf8.Flush());
    }
    echoed = true;
  };
  const auto on_token = [&](size_t request, int32_t token) {
    echo();
    if (token < tokenizer->vocab_size()) {
      emit(request, answers[request].Push(tokenizer->DecodeToken(token)));
    }
    return !answers[request].stopped() && !StopRequested();
  };
  infer::GenerateStats stats;
  infer::SpeculateStats drafts;
  const auto results = options.speculate.draft_layers > 0
                           ? SpeculateAll(model, requests, options, on_token, &drafts)
                           : infer::Generate(model, requests, options.generate, on_token, &stats);
  echo();
  for (size_t i = 0; i < prompts.size(); ++i) emit(i, answers[i].Finish());
  if (stream) {
    fmt::print("\n");
  } else {
    PrintAnswers(options, prompts, requests, results, texts);
  }
  std::fflush(stdout);
  if (!options.stats) return;
  if (options.speculate.draft_layers > 0) {
    PrintStats(drafts);
  } else {
    PrintStats(stats, model.config, results, options.json);
  }
}

}  // namespace

void AddGenerateCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("generate", "Continue prompts");
  infer::GenerateOptions& g = options->generate;
  sub->add_option("-m,--model", options->model, "Model directory with its tokenizer, or .gguf")
      ->required();
  sub->add_option("-p,--prompt", options->prompts, "Prompt; may be given several times")
      ->allow_extra_args(false);
  sub->add_option("--prompts", options->prompts_file, "File with a prompt per line; - for stdin");
  sub->add_option("-n,--max-tokens", options->max_tokens, "New tokens per prompt")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  AddSamplingOptions(*sub, &g.sampling);
  sub->add_option("--stop", options->stop, "String that ends an answer; may be given several times")
      ->allow_extra_args(false);
  AddFlag(*sub, "--ignore-eos,!--no-ignore-eos", options->ignore_eos,
          "Do not stop at the end-of-text token");
  sub->add_option("--prefill-chunk", g.prefill_chunk,
                  "Prompt tokens per forward pass; changes no token")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--max-batch", g.max_batch, "Prompts at the same time; changes no token")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  AddExitOptions(*sub, &g.exit);
  sub->add_option("--draft-layers", options->speculate.draft_layers,
                  "Greedy decoding drafted by the first so many layers; changes no token; 0: off")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub->add_option("--draft-tokens", options->speculate.draft_tokens,
                  "Tokens drafted before all layers verify them")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  AddFlag(*sub, "--stats,!--no-stats", options->stats,
          "Speed, cache bytes and routing on standard error");
  AddFlag(*sub, "--json,!--no-json", options->json,
          "A line of JSON per prompt, with token ids and routing, at the end");
  AddWeightsOption(*sub, &options->weights);
  AddRuntimeOptions(*sub, &options->runtime);
  sub->footer(
      "Example:\n  detour generate --model out/dtrnet/latest --prompt \"The state of the union\" "
      "--max-tokens 200 --stats");
  sub->callback([options] { Generate(*options); });
}

}  // namespace detour::cli
