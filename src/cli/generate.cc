#include "infer/generate.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <memory>
#include <optional>
#include <utility>

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
void PrintStats(const infer::GenerateStats& stats, const infer::Attendance& attendance, bool json) {
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

/// Writes answers in the order of the prompts, each as soon as those before it are there: as text,
/// one block each, or one line of JSON each; a single one as it comes.
class Printer {
 public:
  Printer(const Options& options, const std::vector<std::string>& prompts,
          const std::vector<infer::Request>& requests, const data::Tokenizer& tokenizer)
      : options_(options),
        prompts_(prompts),
        requests_(requests),
        tokenizer_(tokenizer),
        stream_(prompts.size() == 1 && !options.json) {}

  /// False if a stop string ends the answer.
  bool Push(size_t request, int32_t token) {
    Answer& answer = Of(request);
    if (stream_) Echo();
    if (token < tokenizer_.vocab_size()) {
      Emit(answer, answer.pieces.Push(tokenizer_.DecodeToken(token)));
    }
    return !answer.pieces.stopped();
  }

  void End(size_t request, infer::RequestResult result) {
    Answer& answer = Of(request);
    if (stream_) Echo();
    Emit(answer, answer.pieces.Finish());
    answer.result = std::move(result);
    while (!answers_.empty() && answers_.begin()->first == next_ &&
           answers_.begin()->second.result) {
      PrintFirst();
    }
  }

 private:
  struct Answer {
    infer::AnswerText pieces;
    std::string text;
    std::optional<infer::RequestResult> result;
  };

  Answer& Of(size_t request) {
    return answers_.try_emplace(request, infer::AnswerText(&options_.stop), "", std::nullopt)
        .first->second;
  }

  void Emit(Answer& answer, const std::string& text) {
    if (!stream_) {
      answer.text += text;
      return;
    }
    const std::string shown = screen_ ? report::Harmless(text) : text;
    std::fwrite(shown.data(), 1, shown.size(), stdout);
    std::fflush(stdout);
  }

  /// The prompt is printed with the first token: all checks are behind us then.
  void Echo() {
    if (std::exchange(echoed_, true)) return;
    data::Utf8Stream utf8;
    const std::string prompt = utf8.Push(prompts_[0]);
    Emit(answers_.begin()->second, prompt + utf8.Flush());
  }

  void PrintFirst() {
    const auto& [i, answer] = *answers_.begin();
    const infer::RequestResult& r = *answer.result;
    if (stream_) {
      fmt::print("\n");
    } else if (!options_.json) {
      fmt::print("=== {} ({})\n{}{}\n", i + 1, r.finish_reason, prompts_[i], answer.text);
    } else {
      const Json line = {{"prompt", prompts_[i]},
                         {"text", answer.text},
                         {"finish_reason", r.finish_reason},
                         {"prompt_tokens", requests_[i].prompt},
                         {"tokens", r.tokens},
                         {"routed_tokens_by_layer", r.routed_tokens},
                         {"positions", r.num_positions},
                         {"peak_rss_bytes", report::PeakRssBytes()}};
      fmt::print("{}\n", line.dump(-1, ' ', false, Json::error_handler_t::replace));
    }
    std::fflush(stdout);
    next_ = i + 1;
    answers_.erase(answers_.begin());
  }

  const Options& options_;
  const std::vector<std::string>& prompts_;
  const std::vector<infer::Request>& requests_;
  const data::Tokenizer& tokenizer_;
  const bool stream_, screen_ = isatty(STDOUT_FILENO) != 0;
  bool echoed_ = false;
  size_t next_ = 0;
  std::map<size_t, Answer> answers_;  // that are not printed
};

/// One request after the other, drafted by the first layers.
void SpeculateAll(const model::Model& model, const std::vector<infer::Request>& requests,
                  const Options& options, const infer::GenerateCalls& calls,
                  infer::SpeculateStats* stats) {
  const infer::GenerateOptions& g = options.generate;
  if (g.sampling.temperature != 0 || g.sampling.repetition_penalty != 1 ||
      g.exit.kind != model::ExitRule::Kind::kNone) {
    Fail("generate.draft",
         "--draft-layers: expected greedy decoding: --temp 0, no --repetition-penalty, no --exit");
  }
  infer::CheckRequests(model.config, requests);
  for (size_t i = 0; i < requests.size() && !calls.stopping(); ++i) {
    infer::SpeculateOptions speculate = options.speculate;
    speculate.max_tokens = requests[i].max_tokens;
    speculate.prefill_chunk = g.prefill_chunk;
    speculate.eos_id = g.eos_id;
    const auto on_token = [&](int32_t t) { return calls.on_token(i, t) && !calls.stopping(); };
    infer::SpeculateResult r =
        infer::Speculate(model, requests[i].prompt, speculate, on_token, stats);
    infer::RequestResult result;
    result.num_positions = std::ssize(requests[i].prompt) + std::ssize(r.tokens) - 1;
    result.routed_tokens.assign(model.layers.size(), result.num_positions);
    result.tokens = std::move(r.tokens);
    result.finish_reason = std::move(r.finish_reason);
    calls.on_result(i, std::move(result));
  }
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
  Printer printer(options, prompts, requests, *tokenizer);
  infer::Attendance attendance;
  const infer::GenerateCalls calls{
      .on_token = [&](size_t request, int32_t token) { return printer.Push(request, token); },
      .on_result =
          [&](size_t request, infer::RequestResult result) {
            attendance.Add(model.config, result.routed_tokens, result.num_positions);
            printer.End(request, std::move(result));
          },
      .stopping = StopRequested};
  infer::GenerateStats stats;
  infer::SpeculateStats drafts;
  if (options.speculate.draft_layers > 0) {
    SpeculateAll(model, requests, options, calls, &drafts);
  } else {
    infer::GenerateEach(model, requests, options.generate, calls, &stats);
  }
  if (!options.stats) return;
  if (options.speculate.draft_layers > 0) {
    PrintStats(drafts);
  } else {
    PrintStats(stats, attendance, options.json);
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
          "A line of JSON per prompt, with token ids and routing");
  AddWeightsOption(*sub, &options->weights);
  AddRuntimeOptions(*sub, &options->runtime);
  sub->footer(
      "Example:\n  detour generate --model out/dtrnet/latest --prompt \"The state of the union\" "
      "--max-tokens 200 --stats");
  sub->callback([options] { Generate(*options); });
}

}  // namespace detour::cli
