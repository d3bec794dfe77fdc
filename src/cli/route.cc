#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>

#include "cli/commands.h"
#include "cli/common.h"
#include "convert/load.h"
#include "eval/perplexity.h"
#include "io/atomic.h"
#include "model/cost.h"
#include "report/table.h"
#include "routing/registry.h"
#include "train/config.h"
#include "train/fit_bypass.h"
#include "train/step.h"

namespace detour::cli {

namespace {

struct Options {
  train::TrainConfig train;
  std::string out, data;
  double margin = 2;
  int64_t eval_tokens = 32768, seq_len = 1024;
  RuntimeOptions runtime;
};

/// Whether the user set `setting`, for all methods or for this one.
bool Asks(const std::vector<std::string>& given, const std::string& method,
          const std::string& setting) {
  return std::find(given.begin(), given.end(), setting) != given.end() ||
         std::find(given.begin(), given.end(), method + "." + setting) != given.end();
}

/// What suits routers that are new in a model that is trained: a hard weight of 1, so that the
/// output projection stays as it is, and a scorer that does not mind how large the residual stream
/// has grown. Options that the user gave come after them and win.
std::vector<std::string> WithDefaults(const std::string& methods,
                                      const std::vector<std::string>& given) {
  std::vector<std::string> settings;
  for (size_t begin = 0; begin <= methods.size();) {
    const size_t end = std::min(methods.find('+', begin), methods.size());
    const std::string method = methods.substr(begin, end - begin);
    begin = end + 1;
    if (method == "dense") continue;
    for (const routing::Option& o : routing::FindMethod(method).options()) {
      if (o.key == "estimator" && o.fallback == "prob_gate") {
        settings.push_back(method + ".estimator=ste");
      }
      // A value in place of attention is nothing that a trained model knows; a part of it is.
      if (o.key == "value_scale" && Asks(given, method, "bypass=constant")) {
        settings.push_back(method + ".value_scale=true");
      }
      if (o.key == "scorer" && o.fallback == "mlp") {
        settings.push_back(method + ".scorer=norm_mlp");
        settings.push_back(method + ".hidden=64");
      }
    }
  }
  settings.insert(settings.end(), given.begin(), given.end());
  return settings;
}

/// Opens every gate; returns how many routers have none to open.
int CountUnopened(model::Model& model, double margin) {
  int unopened = 0;
  for (const model::RouterId& id : model::Routers(model.config)) {
    routing::Router& router = *model.layers[id.layer].router(id.site);
    unopened += !router.Open(margin) && router.num_experts() == 0 && router.blocks().size == 0;
  }
  return unopened;
}

void PrintStart(const Options& options, const model::Model& routed) {
  const data::TokenShards shards = data::TokenShards::Open(options.data, data::Split::kVal);
  const eval::EvalOptions eval{.seq_len = options.seq_len, .max_tokens = options.eval_tokens};
  const double dense = eval::Evaluate(model::LoadModel(options.train.init_from), shards, eval).loss;
  const eval::EvalResult start = eval::Evaluate(routed, shards, eval);
  fmt::print(
      "validation perplexity {:.3f}, {:.4f} times the dense model's {:.3f}; {} attend in routed "
      "layers\n",
      start.perplexity, std::exp(start.loss - dense), std::exp(dense),
      report::FormatPercent(start.share_routed));
}

void PrintFit(const std::vector<train::FittedBypass>& fitted) {
  std::string shares;
  for (const train::FittedBypass& f : fitted) {
    shares += fmt::format("  {}: {}", f.layer, report::FormatPercent(f.explained));
  }
  fmt::print("bypass fitted to what attention adds; part of its square explained, by layer:{}\n",
             shares);
}

void Route(Options options) {
  ApplyRuntimeOptions(options.runtime);
  train::TrainConfig& c = options.train;
  RefuseGguf("MODEL", c.init_from);
  if (c.method.empty() || c.method == "dense") {
    Fail("flag", "--method: expected a routing method, e.g. dtrnet (docs/routing.md)");
  }
  if (std::filesystem::exists(options.out)) {
    Fail("route", "{} exists. Hint: choose another --out, or remove it", options.out);
  }
  if (!model::LoadConfig(c.init_from).routing.empty()) {
    Fail("route", "{}: expected a dense model, got one of method {}", c.init_from,
         MethodName(model::LoadConfig(c.init_from)));
  }
  c.routing = WithDefaults(c.method, c.routing);
  model::Model model = train::InitialModel(c);
  const int unopened = CountUnopened(model, options.margin);
  std::vector<train::FittedBypass> fitted;
  if (!options.data.empty()) {
    fitted = train::FitBypass(model, data::TokenShards::Open(options.data, data::Split::kTrain),
                              options.seq_len, options.eval_tokens);
  }
  {
    io::AtomicDir dir(options.out);
    SaveModel(model, dir.path());
    convert::WriteTokenizerFiles(c.init_from, dir.path());
    dir.Commit();
  }
  const auto routers = static_cast<double>(model::RouterParameterCount(model.config));
  const auto all = static_cast<double>(model::ParameterCount(model.config));
  fmt::print("{}: method {}, {} of {} layers routed, {} parameters in routers ({:.2f} %)\n",
             options.out, MethodName(model.config), RoutedLayers(model.config).size(),
             model.config.num_layers, report::FormatCount(routers), 100 * routers / all);
  if (unopened > 0 && routers > 0) {
    fmt::print(
        "note: {} routers of this method cannot be set to let every token in: the model starts "
        "away from the dense one\n",
        unopened);
  }
  if (!fitted.empty()) PrintFit(fitted);
  if (!options.data.empty()) PrintStart(options, model);
  fmt::print(
      "next: detour train --init-from {} --teacher {} --train {}{} --data DIR --out-dir DIR\n",
      options.out, c.init_from, routers > 0 ? "router" : "lora",
      train::HasShiftableRouter(model) ? " --target-share SHARE" : "");
}

}  // namespace

void AddRouteCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  train::TrainConfig& c = options->train;
  CLI::App* sub = app.add_subcommand(
      "route", "A dense model with routers added, as near to what it was as the method allows");
  sub->add_option("model", c.init_from, "Dense model directory")->required();
  sub->add_option("--out", options->out, "Directory to make")->required();
  sub->add_option("--method", c.method, "Routing method, or several joined by +")->required();
  sub->add_option("--layers,--layout", c.layout,
                  "Routed layers: bilayer, bilayer_dense_ends, trilayer, all, all_but_two, middle, "
                  "or 1,3,5");
  sub->add_option("--routing", c.routing,
                  "KEY=VALUE or METHOD.KEY=VALUE: an option of the method (docs/routing.md). Gates "
                  "start with estimator=ste, scorer=norm_mlp, hidden=64")
      ->allow_extra_args(false);
  sub->add_option("--margin", options->margin,
                  "Logit difference with which gates start: every token attends")
      ->check(Number(0.001, 100))
      ->capture_default_str();
  sub->add_option("--seed", c.seed, "Of the new weights")
      ->check(SeedRange())
      ->capture_default_str();
  sub->add_option(
      "--data", options->data,
      "Shards made by detour prepare: fits what a constant bypass says, and compares the "
      "perplexity with the dense model's");
  sub->add_option("--seq-len", options->seq_len, "Tokens per sequence of that")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--eval-tokens", options->eval_tokens, "Tokens of that")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  AddRuntimeOptions(*sub, &options->runtime);
  sub->footer(
      "Example:\n  detour route out/dense/latest --method dtrnet --layers bilayer --out "
      "out/routed\n"
      "  detour train --init-from out/routed --teacher out/dense/latest --train router "
      "--target-share 0.5 --data data/sotu --max-steps 200 --out-dir out/taught");
  sub->callback([options] { Route(*options); });
}

}  // namespace detour::cli
