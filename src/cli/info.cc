#include <CLI/CLI.hpp>
#include <algorithm>
#include <filesystem>
#include <memory>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/run_config.h"
#include "convert/load.h"
#include "core/json.h"
#include "model/cost.h"
#include "report/table.h"

namespace detour::cli {

namespace {

struct Options {
  std::string model, lengths = "2048,8192,20480";
  double share = 0.1;
  int64_t match_flops = 0;
  bool json = false;
};

/// One length: ours and the dense model of the same shape.
struct Row {
  int64_t seq_len;
  model::Flops causal, full, dense_causal, dense_full;
  double kv_bytes, dense_kv_bytes;
};

Row RowFor(const model::ModelConfig& c, int64_t seq_len, double share) {
  using model::Counting;
  const model::ModelConfig dense = model::DenseTwin(c);
  return {seq_len,
          model::ForwardFlops(c, seq_len, share, Counting::kCausal),
          model::ForwardFlops(c, seq_len, share, Counting::kFull),
          model::ForwardFlops(dense, seq_len, 1.0, Counting::kCausal),
          model::ForwardFlops(dense, seq_len, 1.0, Counting::kFull),
          model::KvBytes(c, seq_len, share),
          model::KvBytes(dense, seq_len, 1.0)};
}

/// Layers whose weights no layer below has.
int32_t NumWeightLayers(const model::ModelConfig& c) {
  int32_t count = 0;
  for (int32_t l = 0; l < c.num_layers; ++l) count += WeightsLayer(c, l) == l;
  return count;
}

/// Whether the rows of some layer depend on the share that gates let in.
bool DependsOnShare(const model::ModelConfig& c) {
  const auto low = RowsAtShare(c, 1000, 0.25), high = RowsAtShare(c, 1000, 0.75);
  return !std::equal(low.begin(), low.end(), high.begin(), [](const auto& a, const auto& b) {
    return a.entered == b.entered && a.attended == b.attended && a.visited == b.visited &&
           a.fed == b.fed;
  });
}

/// "layers 0-2 100.0%, 3-4 66.7%": what the layers let in.
std::string SharesText(const model::ModelConfig& c, double share) {
  constexpr int64_t kTokens = 1000000;
  const std::vector<model::LayerRows> rows = RowsAtShare(c, kTokens, share);
  std::string text;
  for (int32_t begin = 0, end = 0; begin < c.num_layers; begin = end) {
    while (end < c.num_layers && rows[end].entered == rows[begin].entered) ++end;
    text += fmt::format("{}{}{} {}", text.empty() ? "layers " : ", ", begin,
                        end - begin > 1 ? fmt::format("-{}", end - 1) : "",
                        report::FormatPercent(rows[begin].entered / kTokens));
  }
  return text;
}

Json ToJson(const model::ModelConfig& c, double share, const std::vector<Row>& rows) {
  Json lengths = Json::array();
  for (const Row& r : rows) {
    const auto n = static_cast<double>(r.seq_len);
    lengths.push_back({{"seq_len", r.seq_len},
                       {"flops_per_token_causal", r.causal.Total() / n},
                       {"flops_per_token_full", r.full.Total() / n},
                       {"dense_flops_per_token_causal", r.dense_causal.Total() / n},
                       {"dense_flops_per_token_full", r.dense_full.Total() / n},
                       {"ratio_causal", r.causal.Total() / r.dense_causal.Total()},
                       {"ratio_full", r.full.Total() / r.dense_full.Total()},
                       {"kv_bytes", r.kv_bytes},
                       {"dense_kv_bytes", r.dense_kv_bytes}});
  }
  return {{"method", MethodName(c)},
          {"routed_layers", RoutedLayers(c)},
          {"weight_layers", NumWeightLayers(c)},
          {"share", share},
          {"parameters", model::ParameterCount(c)},
          {"router_parameters", model::RouterParameterCount(c)},
          {"lengths", lengths}};
}

void Print(const model::ModelConfig& c, double share, const std::vector<Row>& rows) {
  const auto parameters = static_cast<double>(model::ParameterCount(c));
  const auto routers = static_cast<double>(model::RouterParameterCount(c));
  fmt::print(
      "method {}: {} layers, {} of them routed; hidden {}, ffn {}, heads {} / {} of width {}, "
      "vocabulary {}, {} head\n",
      MethodName(c), c.num_layers, RoutedLayers(c).size(), c.hidden_size, c.intermediate_size,
      c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size,
      c.tie_word_embeddings ? "tied" : "own");
  fmt::print("parameters {}, of which routers {} ({:.2f} %)\n", report::FormatCount(parameters),
             report::FormatCount(routers), 100 * routers / parameters);
  const int32_t weight_layers = NumWeightLayers(c);
  if (weight_layers < c.num_layers) {
    fmt::print(
        "{} of the layers hold weights, the others use them again; tokens that enter, if "
        "loads are even: {}\n",
        weight_layers, SharesText(c, share));
  }
  const bool share_counts = c.routing.empty() || DependsOnShare(c);
  fmt::print(
      "forward FLOPs per token{}; multiply-add = 2; router and head included; "
      "causal: keys visited, full: whole score matrices\n",
      share_counts
          ? fmt::format(" at {} of tokens attending in routed layers", report::FormatPercent(share))
          : "");
  report::TextTable table({{"length"},
                           {"FLOPs causal"},
                           {"dense"},
                           {"ratio"},
                           {"FLOPs full"},
                           {"dense"},
                           {"ratio"},
                           {"KV bytes"},
                           {"dense"},
                           {"ratio"}});
  for (const Row& r : rows) {
    const auto n = static_cast<double>(r.seq_len);
    table.AddRow({report::FormatThousands(r.seq_len), report::FormatCount(r.causal.Total() / n),
                  report::FormatCount(r.dense_causal.Total() / n),
                  report::FormatFixed(r.causal.Total() / r.dense_causal.Total(), 3),
                  report::FormatCount(r.full.Total() / n),
                  report::FormatCount(r.dense_full.Total() / n),
                  report::FormatFixed(r.full.Total() / r.dense_full.Total(), 3),
                  report::FormatBytes(r.kv_bytes), report::FormatBytes(r.dense_kv_bytes),
                  report::FormatFixed(r.kv_bytes / r.dense_kv_bytes, 3)});
  }
  fmt::print("{}", table.Render());
}

void Info(const Options& options) {
  const model::ModelConfig config = convert::LoadConfig(options.model);
  if (options.match_flops > 0) {
    fmt::print("{}\n",
               ConfigToJson(MatchFlops(config, options.match_flops, options.share)).dump(2));
    return;
  }
  std::vector<Row> rows;
  for (int64_t n : ParseLengths("--seq-len", options.lengths)) {
    rows.push_back(RowFor(config, n, options.share));
  }
  if (options.json) {
    fmt::print("{}\n", ToJson(config, options.share, rows).dump(2));
  } else {
    Print(config, options.share, rows);
  }
}

}  // namespace

void AddInfoCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("info", "Parameters, FLOPs per token, KV bytes, beside dense");
  sub->add_option("model", options->model, "Model directory, config.json or .gguf")->required();
  sub->add_option("--seq-len", options->lengths, "Lengths, e.g. 2048,8192,20480")
      ->capture_default_str();
  sub->add_option("--share", options->share, "Share of tokens that attend in routed layers")
      ->check(Number(0, 1))
      ->capture_default_str();
  sub->add_option(
         "--match-flops", options->match_flops,
         "Print instead the config of the dense model of equal causal FLOPs at this length")
      ->check(CLI::PositiveNumber);
  AddFlag(*sub, "--json,!--no-json", options->json, "Print JSON");
  sub->footer("Example:\n  detour info configs/dtrnet-360m.json --seq-len 2048,8192,20480");
  sub->callback([options] { Info(*options); });
}

}  // namespace detour::cli
