// detour report: trained models side by side, as a table and as a page.
#include <ATen/ATen.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>
#include <sstream>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/run_config.h"
#include "core/json.h"
#include "eval/perplexity.h"
#include "infer/generate.h"
#include "infer/measure.h"
#include "infer/score.h"
#include "io/atomic.h"
#include "model/cost.h"
#include "report/child.h"
#include "report/html.h"
#include "report/table.h"

namespace detour::cli {

namespace {

struct Options {
  std::vector<std::string> runs;
  std::string data, out, json, prompt = "The state of the union is", lengths = "1024,8192,32000";
  int64_t eval_tokens = 0, sample_tokens = 120, map_tokens = 240, seq_len = 1024;
  std::string weights = "f32";
  RuntimeOptions runtime;
};

/// One run, or a model alone, and what was measured of it.
struct Entry {
  std::string name, dir, model_dir;
  model::Model model;
  Json summary;
  report::Series train_loss, val_loss, share;
  eval::EvalResult eval;
  std::vector<infer::LengthFigures> lengths;
  std::string sample;
  int64_t inference_peak_bytes = -1, inference_length = 0;
};

Json ReadJson(const std::string& path) { return ParseJson(io::ReadFile(path, 1 << 24), path); }

void ReadMetrics(Entry* entry) {
  const std::string path = entry->dir + "/metrics.jsonl";
  std::istringstream lines(io::ReadFile(path));
  const auto add = [](report::Series& s, const Json& record, const char* key) {
    if (!record.contains(key) || !record.at(key).is_number()) return;
    s.xs.push_back(record.at("step").get<double>());
    s.ys.push_back(record.at(key).get<double>());
  };
  for (std::string line; std::getline(lines, line);) {
    const Json record = ParseJson(line, path);
    if (!record.contains("step")) continue;
    add(entry->train_loss, record, "loss");
    add(entry->val_loss, record, "val_loss");
    add(entry->share, record, "share");
  }
  entry->train_loss.name = entry->name + ", training";
  entry->val_loss.name = entry->name + ", validation";
  entry->share.name = entry->name;
}

Entry LoadEntry(const std::string& run, const std::string& weights) {
  const size_t equals = run.find('=');
  Entry entry;
  entry.name = equals == std::string::npos ? std::filesystem::path(run).filename().string()
                                           : run.substr(0, equals);
  entry.dir = equals == std::string::npos ? run : run.substr(equals + 1);
  const bool trained_here = std::filesystem::exists(entry.dir + "/latest");
  entry.model_dir = trained_here ? entry.dir + "/latest" : entry.dir;
  entry.model = model::LoadModel(entry.model_dir, ServingWeights(weights));
  if (trained_here) {
    entry.summary = ReadJson(entry.dir + "/summary.json");
    ReadMetrics(&entry);
  }
  return entry;
}

/// A figure of the training run; none for a model alone.
std::optional<double> TrainingFigure(const Entry& entry, const char* key) {
  if (entry.summary.is_null()) return std::nullopt;
  return GetDouble(entry.summary, key, entry.dir);
}

void Evaluate(const Options& options, const data::TokenShards& val, Entry* entry) {
  entry->eval = eval::Evaluate(entry->model, val,
                               {.seq_len = options.seq_len, .max_tokens = options.eval_tokens});
}

void AddSample(const Options& options, const data::Tokenizer& tokenizer, Entry* entry) {
  const auto results =
      infer::Generate(entry->model, {{tokenizer.Encode(options.prompt), options.sample_tokens}},
                      {.sampling = {.temperature = 0.8, .top_p = 0.95}}, nullptr);
  entry->sample = tokenizer.Decode(results[0].tokens);
}

/// Rows of the comparison, one cell per entry.
std::vector<report::ComparisonTable::Row> Rows(const std::vector<Entry>& entries) {
  std::vector<report::ComparisonTable::Row> rows;
  const auto row = [&](const std::string& metric, const std::string& detail, auto&& cell) {
    report::ComparisonTable::Row r{.metric = metric, .detail = detail};
    for (const Entry& e : entries) r.cells.push_back(cell(e));
    rows.push_back(std::move(r));
  };
  const auto section = [&](const std::string& name) {
    rows.push_back({.metric = name, .section = true});
  };
  section("Model");
  row("Parameters", "routers included", [](const Entry& e) {
    return report::FormatCount(static_cast<double>(model::ParameterCount(e.model.config)));
  });
  row("… in routers", "", [](const Entry& e) {
    return report::FormatCount(static_cast<double>(model::RouterParameterCount(e.model.config)));
  });
  section("Quality on validation text");
  row("Loss", "nats per token, ± standard error", [](const Entry& e) {
    return fmt::format("{:.4f} ± {:.4f}", e.eval.loss, e.eval.loss_stderr);
  });
  row("Bits per byte", "",
      [](const Entry& e) { return report::FormatFixed(e.eval.bits_per_byte, 4); });
  row("Tokens that attend", "mean over routed layers", [](const Entry& e) {
    return e.model.config.routing.empty() ? "100%" : report::FormatPercent(e.eval.share_routed);
  });
  section("Cost");
  row("Forward FLOPs per token", "counted as executed, causal, router and head in",
      [](const Entry& e) { return report::FormatCount(e.eval.flops_per_token); });
  row("Training speed", "tokens per second", [](const Entry& e) {
    const auto speed = TrainingFigure(e, "tokens_per_s");
    return speed ? report::FormatCount(*speed) : "–";
  });
  row("Training memory", "peak resident", [](const Entry& e) {
    const auto bytes = TrainingFigure(e, "peak_rss_bytes");
    return bytes ? report::FormatBytes(*bytes) : "–";
  });
  row("Inference memory",
      fmt::format("peak resident, {} tokens in one sequence",
                  report::FormatThousands(entries[0].inference_length)),
      [](const Entry& e) {
        return e.inference_peak_bytes < 0
                   ? std::string("–")
                   : report::FormatBytes(static_cast<double>(e.inference_peak_bytes));
      });
  for (size_t i = 0; i < entries[0].lengths.size(); ++i) {
    row(fmt::format("KV cache at {}", report::FormatThousands(entries[0].lengths[i].length)),
        "pages handed out", [i](const Entry& e) {
          return report::FormatBytes(static_cast<double>(e.lengths[i].kv_bytes));
        });
  }
  for (size_t i = 0; i < entries[0].lengths.size(); ++i) {
    row(fmt::format("Prefill of {}", report::FormatThousands(entries[0].lengths[i].length)),
        "seconds, one sequence",
        [i](const Entry& e) { return report::FormatFixed(e.lengths[i].prefill_seconds, 2); });
  }
  for (size_t i = 0; i < entries[0].lengths.size(); ++i) {
    row(fmt::format("Decode at {}", report::FormatThousands(entries[0].lengths[i].length)),
        "tokens per second, one sequence",
        [i](const Entry& e) { return report::FormatFixed(e.lengths[i].decode_tokens_per_s, 0); });
  }
  return rows;
}

report::BarChart ShareChart(const std::vector<Entry>& entries) {
  report::BarChart chart{.title = "Share of tokens that attend, by layer",
                         .x_label = "layer",
                         .y_style = report::NumberStyle::kPercent,
                         .y_max = 1.0,
                         .muted_label = "dense layer"};
  for (size_t l = 0; l < entries[0].model.layers.size(); ++l) {
    chart.categories.push_back(std::to_string(l));
  }
  for (const Entry& e : entries) {
    if (e.model.config.routing.empty()) continue;
    report::BarSeries series{.name = e.name};
    series.values.assign(e.model.layers.size(), 1.0);
    series.muted.assign(e.model.layers.size(), true);
    for (const eval::RouterFigures& f : e.eval.routers) {
      if (!series.muted[f.id.layer]) continue;  // the layer's first router
      series.values[f.id.layer] = f.share;
      series.muted[f.id.layer] = false;
    }
    chart.series.push_back(std::move(series));
  }
  return chart;
}

report::RouteMap MakeMap(const Entry& e, const data::Tokenizer& tokenizer,
                         const std::vector<int32_t>& tokens) {
  report::RouteMap map{
      .title = fmt::format("{}: which tokens attended in which layer", e.name),
      .note = "Validation text. A filled cell attends, a light one takes its own value."};
  for (int32_t id : tokens) {
    map.tokens.push_back(id < tokenizer.vocab_size() ? tokenizer.DecodeToken(id) : "?");
  }
  const infer::Scores scores = infer::Score(e.model, {tokens}, infer::ScoreMode::kFull);
  for (size_t l = 0; l < e.model.layers.size(); ++l) {
    size_t r = 0;  // the layer's first gate, if it has any
    while (r < scores.routers.size() &&
           (scores.routers[r].layer != static_cast<int32_t>(l) || e.eval.routers[r].experts)) {
      ++r;
    }
    const bool routed = r < scores.routers.size();
    map.layer_names.push_back(std::to_string(l));
    map.kinds.push_back(routed ? report::LayerKind::kRouted : report::LayerKind::kDense);
    for (size_t t = 0; t < tokens.size(); ++t) {
      map.routed.push_back(routed ? scores.routes[0][r].routed[t] : 1);
      map.p.push_back(routed ? scores.routes[0][r].probs[2 * t] : 1.0f);
    }
  }
  return map;
}

std::string RenderPage(const Options& options, const std::vector<Entry>& entries,
                       const std::vector<report::ComparisonTable::Row>& rows,
                       const data::Tokenizer& tokenizer, const std::vector<int32_t>& map_tokens) {
  report::HtmlPage page("Detour: routed and dense, side by side",
                        "Same shape, data, seed and number of training tokens");
  report::ComparisonTable table{.rows = rows};
  report::LineChart loss{.title = "Loss over training", .x_label = "step", .y_label = "nats"};
  report::LineChart share{.title = "Share of tokens that attend in routed layers, over training",
                          .x_label = "step",
                          .y_style = report::NumberStyle::kPercent};
  std::vector<report::TextSample> samples;
  int color = 0;
  for (const Entry& e : entries) {
    table.columns.push_back(e.name);
    for (report::Series s : {e.train_loss, e.val_loss}) {
      if (s.xs.empty()) continue;
      s.color = color;
      s.dashed = s.name == e.val_loss.name;
      loss.series.push_back(std::move(s));
    }
    if (!e.share.xs.empty()) share.series.push_back(e.share);
    samples.push_back({e.name, options.prompt, e.sample});
    ++color;
  }
  page.Table(table);
  page.Heading("Training");
  page.Chart(loss);
  if (!share.series.empty()) page.Chart(share);
  if (const report::BarChart chart = ShareChart(entries); !chart.series.empty()) {
    page.Heading("Routing");
    page.Chart(chart);
    for (const Entry& e : entries) {
      if (!e.model.config.routing.empty()) page.Map(MakeMap(e, tokenizer, map_tokens));
    }
  }
  page.Heading("Samples");
  page.TextSamples(samples);
  page.Footer(
      "Decode and prefill are interleaved between the models in one run. FLOPs: a "
      "multiply-add counts as 2.");
  return page.Render();
}

/// Peak memory of a process that loads the model, reads a long prompt and answers one token.
void MeasureInference(const data::Tokenizer& tokenizer, const std::vector<int32_t>& text,
                      const std::vector<int64_t>& lengths, Entry* entry) {
  int64_t length = lengths.front();
  for (int64_t n : lengths) {
    if (n <= 8192) length = std::max(length, n);
  }
  length = std::min<int64_t>(length, entry->model.config.max_position_embeddings - 1);
  std::string prompt =
      tokenizer.Decode(std::span(text).first(std::min<size_t>(length, text.size())));
  std::replace(prompt.begin(), prompt.end(), '\n', ' ');
  const auto answer =
      report::OutputOf({"/proc/self/exe", "generate", "--model", entry->model_dir, "--prompts", "-",
                        "--max-tokens", "1", "--ignore-eos", "--json"},
                       prompt + "\n");
  if (!answer) return;
  const Json json = ParseJson(*answer, "detour generate");
  entry->inference_peak_bytes = GetInt(json, "peak_rss_bytes", "detour generate");
  entry->inference_length = std::ssize(json.at("prompt_tokens"));
}

Json ToJson(const std::vector<Entry>& entries) {
  Json runs = Json::array();
  const auto figure = [](const Entry& e, const char* key) {
    const auto value = TrainingFigure(e, key);
    return value ? Json(*value) : Json();
  };
  for (const Entry& e : entries) {
    Json lengths = Json::array();
    for (const infer::LengthFigures& f : e.lengths) {
      lengths.push_back({{"length", f.length},
                         {"kv_bytes", f.kv_bytes},
                         {"prefill_seconds", f.prefill_seconds},
                         {"decode_tokens_per_s", f.decode_tokens_per_s}});
    }
    runs.push_back({{"name", e.name},
                    {"method", MethodName(e.model.config)},
                    {"parameters", model::ParameterCount(e.model.config)},
                    {"router_parameters", model::RouterParameterCount(e.model.config)},
                    {"loss", e.eval.loss},
                    {"loss_stderr", e.eval.loss_stderr},
                    {"bits_per_byte", e.eval.bits_per_byte},
                    {"share_routed", e.eval.share_routed},
                    {"flops_per_token", e.eval.flops_per_token},
                    {"train_tokens_per_s", figure(e, "tokens_per_s")},
                    {"train_peak_rss_bytes", figure(e, "peak_rss_bytes")},
                    {"inference_length", e.inference_length},
                    {"inference_peak_rss_bytes", e.inference_peak_bytes},
                    {"lengths", lengths}});
  }
  return runs;
}

void Report(const Options& options) {
  ApplyRuntimeOptions(options.runtime);
  std::vector<Entry> entries;
  for (const std::string& run : options.runs) entries.push_back(LoadEntry(run, options.weights));
  const data::TokenShards val = data::TokenShards::Open(options.data, data::Split::kVal);
  const auto tokenizer = data::Tokenizer::Load(entries[0].model_dir);
  std::vector<const model::Model*> models;
  for (Entry& entry : entries) {
    Evaluate(options, val, &entry);
    AddSample(options, *tokenizer, &entry);
    models.push_back(&entry.model);
  }
  // Text as long as the longest length asked for; a short validation split is repeated.
  const std::vector<int64_t> lengths = ParseLengths("--lengths", options.lengths);
  std::vector<int32_t> text(std::min<int64_t>(val.num_tokens(), lengths.back() + 64));
  val.Read(0, text);
  const std::vector<int32_t> map_tokens(
      text.begin(), text.begin() + std::min<int64_t>(options.map_tokens, text.size()));
  while (static_cast<int64_t>(text.size()) < lengths.back() + 64) {
    text.insert(text.end(), text.begin(), text.begin() + std::min<int64_t>(text.size(), 4096));
  }
  const auto figures = infer::MeasureLengths(models, text, lengths);
  for (size_t i = 0; i < entries.size(); ++i) {
    entries[i].lengths = figures[i];
    MeasureInference(*tokenizer, text, lengths, &entries[i]);
  }

  const std::vector<report::ComparisonTable::Row> rows = Rows(entries);
  std::vector<report::TextTable::Column> columns = {{"", report::Align::kLeft}};
  for (const Entry& e : entries) columns.push_back({e.name});
  report::TextTable table(columns);
  for (const auto& row : rows) {
    if (row.section) {
      table.AddRule();
      continue;
    }
    std::vector<std::string> cells = {
        row.detail.empty() ? row.metric : fmt::format("{} ({})", row.metric, row.detail)};
    cells.insert(cells.end(), row.cells.begin(), row.cells.end());
    table.AddRow(cells);
  }
  fmt::print("{}", table.Render());
  for (const Entry& e : entries) {
    if (!e.model.config.routing.empty()) {
      fmt::print("\n{}: share of tokens that attend, by layer:", e.name);
      for (const eval::RouterFigures& f : e.eval.routers) {
        fmt::print("  {}: {}", f.id.name.substr(5), report::FormatPercent(f.share));
      }
      fmt::print("\n");
    }
  }
  for (const Entry& e : entries) {
    fmt::print("\n--- {} ---\n{}{}\n", e.name, options.prompt, e.sample);
  }
  if (!options.json.empty()) io::WriteFileAtomic(options.json, ToJson(entries).dump(2) + "\n");
  if (!options.out.empty()) {
    io::WriteFileAtomic(options.out, RenderPage(options, entries, rows, *tokenizer, map_tokens));
    fmt::print("\n{}\n", options.out);
  }
}

}  // namespace

void AddReportCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("report", "Trained models side by side: a table and a page");
  sub->add_option("--run", options->runs, "NAME=DIR of a training run or a model; several times")
      ->required()
      ->allow_extra_args(false);
  sub->add_option("--data", options->data, "The shards they were trained on")->required();
  sub->add_option("--out", options->out, "HTML page to write");
  sub->add_option("--json", options->json, "JSON file to write, one object a run");
  sub->add_option("--prompt", options->prompt, "Of the text samples")->capture_default_str();
  sub->add_option("--lengths", options->lengths, "Context lengths for cache and speed")
      ->capture_default_str();
  sub->add_option("--seq-len", options->seq_len, "Of the evaluation")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--eval-tokens", options->eval_tokens, "Validation tokens; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub->add_option("--sample-tokens", options->sample_tokens, "Length of the samples")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--map-tokens", options->map_tokens, "Tokens on the route map")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  AddWeightsOption(*sub, &options->weights);
  AddRuntimeOptions(*sub, &options->runtime);
  sub->footer(
      "Example:\n  detour report --run dtrnet=out/dtrnet --run dense=out/dense --data data/sotu "
      "--out report.html");
  sub->callback([options] { Report(*options); });
}

}  // namespace detour::cli
