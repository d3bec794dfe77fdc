#include <CLI/CLI.hpp>
#include <cmath>
#include <memory>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/run_config.h"
#include "convert/load.h"
#include "core/json.h"
#include "data/prepare.h"
#include "eval/perplexity.h"
#include "eval/recall.h"
#include "report/memory.h"
#include "report/table.h"

namespace detour::cli {

namespace {

struct Options {
  std::string model, data, split = "val";
  std::vector<std::string> texts;
  std::string recall;
  eval::EvalOptions eval;
  eval::RecallOptions recall_options;
  std::string weights = "f32";
  RuntimeOptions runtime;
  bool json = false;
};

Json ToJson(const std::vector<eval::RecallResult>& results) {
  Json json = Json::array();
  for (const eval::RecallResult& r : results) {
    json.push_back({{"length", r.length},
                    {"task", r.task},
                    {"answers", r.num_answers},
                    {"right", r.right},
                    {"loss", r.loss}});
  }
  return json;
}

void Print(const std::vector<eval::RecallResult>& results) {
  report::TextTable table({{"length"}, {"task"}, {"answers"}, {"right"}, {"loss a token"}});
  for (const eval::RecallResult& r : results) {
    table.AddRow({report::FormatThousands(r.length), r.task, report::FormatThousands(r.num_answers),
                  report::FormatPercent(r.right), report::FormatFixed(r.loss, 4)});
  }
  fmt::print("\nRecall of facts in text of the split:\n{}", table.Render());
}

Json ToJson(const eval::EvalResult& r) {
  Json layers = Json::array();
  for (const eval::RouterFigures& f : r.routers) {
    Json figures = {{"layer", f.id.layer},
                    {"site", routing::SiteName(f.id.site)},
                    {"share", f.share},
                    {"entropy_bits", f.entropy_bits},
                    {"share_by_position", f.share_by_position}};
    if (f.experts) {
      figures["expert_shares"] = f.expert_shares;
    } else {
      figures["min_margin"] = f.min_margin;
    }
    if (f.causal_agreement < 1) figures["causal_agreement"] = f.causal_agreement;
    layers.push_back(std::move(figures));
  }
  return {{"tokens", r.num_tokens},
          {"sequences", r.num_sequences},
          {"loss", r.loss},
          {"loss_stderr", std::isfinite(r.loss_stderr) ? Json(r.loss_stderr) : Json()},
          {"perplexity", r.perplexity},
          {"bits_per_byte", r.bits_per_byte},
          {"share_routed", r.share_routed},
          {"seconds", r.seconds},
          {"mean_layers", r.mean_layers},
          {"flops_per_token", r.flops_per_token},
          {"peak_rss_bytes", report::PeakRssBytes()},
          {"layers", layers}};
}

void Print(const eval::EvalResult& r) {
  fmt::print("{} tokens in {} sequences, {}\n", report::FormatThousands(r.num_tokens),
             report::FormatThousands(r.num_sequences), report::FormatDuration(r.seconds));
  fmt::print("loss {:.4f}{}   perplexity {:.3f}   bits per byte {:.4f}\n", r.loss,
             std::isfinite(r.loss_stderr) ? fmt::format(" ± {:.4f}", r.loss_stderr) : "",
             r.perplexity, r.bits_per_byte);
  fmt::print("{} FLOP per token as executed, {:.2f} layers\n",
             report::FormatCount(r.flops_per_token), r.mean_layers);
  std::vector<report::TextTable::Column> columns = {
      {"layer"}, {"attend"}, {"entropy, bits"}, {"min |p-0.5|"}};
  for (int64_t b = 0; b < eval::kPositionBuckets; ++b) {
    columns.push_back({fmt::format("{}/{}", b + 1, eval::kPositionBuckets)});
  }
  report::TextTable table(columns);
  double agreement = 1;
  for (const eval::RouterFigures& f : r.routers) {
    std::vector<std::string> row = {f.id.name.substr(5), report::FormatPercent(f.share),
                                    report::FormatFixed(f.entropy_bits, 3),
                                    f.experts ? "" : fmt::format("{:.1e}", f.min_margin)};
    for (double share : f.share_by_position) row.push_back(report::FormatPercent(share));
    table.AddRow(row);
    agreement = std::min(agreement, f.causal_agreement);
  }
  if (r.routers.empty()) return;
  fmt::print(
      "\nTokens that attend, by routed layer and by part of the sequence "
      "(mean over layers {}):\n{}",
      report::FormatPercent(r.share_routed), table.Render());
  for (const eval::RouterFigures& f : r.routers) {
    if (!f.experts) continue;
    std::string loads;
    for (double share : f.expert_shares) loads += "  " + report::FormatPercent(share);
    fmt::print("experts of {}:{}\n", f.id.name, loads);
  }
  if (agreement < 1) {
    fmt::print("the rule that serves agrees on {} of the tokens in the worst layer\n",
               report::FormatPercent(agreement));
  }
}

/// Text of the user's own: packed with the model's tokenizer, all of it evaluated.
eval::EvalResult EvaluateTexts(const model::Model& model, const Options& options) {
  const TemporaryFolder folder;
  const auto tokenizer = convert::LoadTokenizer(options.model);
  data::PrepareOptions prepare;
  prepare.inputs = options.texts;
  prepare.out_dir = folder.path() + "/shards";
  prepare.val_fraction = 0;
  data::Prepare(prepare, data::EncoderOf(*tokenizer, /*parse_special=*/false));
  return eval::Evaluate(model, data::TokenShards::Open(prepare.out_dir, data::Split::kTrain),
                        options.eval);
}

data::Split SplitOf(const Options& options) {
  return options.split == "val" ? data::Split::kVal : data::Split::kTrain;
}

eval::EvalResult EvaluateShards(const model::Model& model, const Options& options) {
  const auto shards = data::TokenShards::Open(options.data, SplitOf(options));
  if (convert::IsGguf(options.model) || data::HasTokenizer(options.model)) {
    data::CheckMadeWith(shards, *convert::LoadTokenizer(options.model), options.model);
  }
  return eval::Evaluate(model, shards, options.eval);
}

void Eval(const Options& options) {
  ApplyRuntimeOptions(options.runtime);
  if (options.data.empty() == options.texts.empty()) {
    Fail("flag", "give either --data DIR or --text PATH");
  }
  if (!options.recall.empty() && options.data.empty()) Fail("flag", "--recall needs --data");
  const model::Model model = convert::LoadModel(options.model, ServingWeights(options.weights));
  const eval::EvalResult result =
      options.texts.empty() ? EvaluateShards(model, options) : EvaluateTexts(model, options);
  Json json = ToJson(result);
  if (!options.json) Print(result);
  if (!options.recall.empty()) {
    eval::RecallOptions recall = options.recall_options;
    recall.lengths = ParseLengths("--recall", options.recall);
    const std::vector<eval::RecallResult> found =
        eval::Recall(model, *convert::LoadTokenizer(options.model),
                     data::TokenShards::Open(options.data, SplitOf(options)), recall);
    json["recall"] = ToJson(found);
    if (!options.json) Print(found);
  }
  if (options.json) fmt::print("{}\n", json.dump(2));
}

}  // namespace

void AddEvalCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub =
      app.add_subcommand("eval", "Loss, perplexity, bits per byte and routing statistics");
  sub->add_option("-m,--model", options->model, "Model directory or .gguf")->required();
  sub->add_option("--data", options->data, "Shards made by detour prepare");
  sub->add_option("--text", options->texts, "Text files, JSON lines or folders instead");
  sub->add_option("--split", options->split, "Of the shards")
      ->check(CLI::IsMember({"train", "val"}))
      ->capture_default_str();
  sub->add_option("--seq-len", options->eval.seq_len, "Tokens per sequence")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--max-tokens", options->eval.max_tokens,
                  "Tokens to evaluate; 0: the whole split")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub->add_option("--micro-batch-size", options->eval.micro_batch_size,
                  "Sequences per forward pass; changes no figure")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  AddFlag(*sub, "--document-attention,!--no-document-attention", options->eval.document_attention,
          "Attention stays inside documents");
  AddExitOptions(*sub, &options->eval.exit);
  sub->add_flag("--teacher-forced", options->eval.teacher_forced,
                "Decide by the training rule, which may look ahead: shows the gap to serving");
  sub->add_option(
      "--recall", options->recall,
      "Lengths, e.g. 2048,8192: also ask for facts hidden in so much text of the split");
  sub->add_option("--recall-prompts", options->recall_options.num_prompts,
                  "Prompts of each task and length")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  sub->add_option("--recall-pairs", options->recall_options.num_pairs,
                  "Facts and questions in a prompt of task pairs")
      ->check(CLI::Range(1, 24))
      ->capture_default_str();
  sub->add_flag("--json", options->json, "Print JSON");
  AddWeightsOption(*sub, &options->weights);
  AddRuntimeOptions(*sub, &options->runtime);
  sub->footer(
      "Example:\n  detour eval --model out/dtrnet/latest --data data/sotu\n"
      "  detour eval --model out/dtrnet/latest --data data/sotu --seq-len 2048 --recall 2048,8192");
  sub->callback([options] { Eval(*options); });
}

}  // namespace detour::cli
