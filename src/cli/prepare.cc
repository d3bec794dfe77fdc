// detour prepare: text to packed token shards.
#include "data/prepare.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/signals.h"
#include "convert/load.h"
#include "core/threads.h"
#include "data/tokenizer.h"
#include "report/status.h"
#include "report/table.h"

namespace detour::cli {
namespace {

struct PrepareFlags {
  data::PrepareOptions options;
  std::string tokenizer, format = "auto";
  bool parse_special = false, dry_run = false;
  int64_t max_line_mb = 64;
  int threads = 0;
};

std::string ProgressText(const data::PrepareProgress& p, report::Eta* eta) {
  eta->Update(p.bytes);
  return fmt::format("{} of {}  {} documents  {} tokens  {:.1f} MB/s  ETA {}",
                     report::FormatBytes(p.bytes), report::FormatBytes(p.total_bytes),
                     report::FormatThousands(p.documents), report::FormatCount(p.tokens),
                     eta->Rate() / 1e6, report::FormatDuration(eta->RemainingSeconds()));
}

void PrintPlan(const PrepareFlags& flags, const data::PreparePlan& plan) {
  constexpr size_t kMaxShown = 20;
  int64_t bytes = 0;
  for (size_t i = 0; i < plan.sources.size(); ++i) {
    const data::Source& source = plan.sources[i];
    bytes += source.bytes;
    if (i < kMaxShown) {
      fmt::print("{:>16}  {:<5}  {}\n", report::FormatThousands(source.bytes),
                 source.format == data::SourceFormat::kJsonl ? "jsonl" : "text", source.name);
    }
  }
  if (plan.sources.size() > kMaxShown) {
    fmt::print("{:>16}  {} more files\n", "…", plan.sources.size() - kMaxShown);
  }
  const std::string val = plan.documents == 1 && plan.val_documents == 1
                              ? "its tail"
                              : report::FormatThousands(plan.val_documents) + " of them";
  fmt::print(
      "dry run: sources {}, bytes {}; documents {}, bytes of text {}; {} for validation; would go "
      "to {}\n",
      plan.sources.size(), report::FormatThousands(bytes), report::FormatThousands(plan.documents),
      report::FormatThousands(plan.text_bytes), val, flags.options.out_dir);
}

void PrintSummary(const std::string& out_dir, const data::ShardManifest& manifest, double seconds) {
  report::TextTable table({{"split", report::Align::kLeft},
                           {"documents"},
                           {"tokens"},
                           {"text bytes"},
                           {"bytes/token"},
                           {"shards"}});
  const auto row = [&](const char* name, const data::SplitInfo& s, size_t num_shards) {
    table.AddRow({name, report::FormatThousands(s.documents), report::FormatThousands(s.tokens),
                  report::FormatThousands(s.text_bytes),
                  s.tokens == 0 ? "-" : fmt::format("{:.3f}", double(s.text_bytes) / s.tokens),
                  std::to_string(num_shards)});
  };
  const data::SplitInfo &train = manifest.train, &val = manifest.val;
  row("train", train, train.shards.size());
  row("val", val, val.shards.size());
  table.AddRule();
  const data::SplitInfo total = {.documents = train.documents + val.documents,
                                 .tokens = train.tokens + val.tokens,
                                 .text_bytes = train.text_bytes + val.text_bytes,
                                 .shards = {}};
  row("total", total, train.shards.size() + val.shards.size());
  double source_bytes = 0;
  for (const data::SourceInfo& s : manifest.sources) source_bytes += s.bytes;
  fmt::print("{}sources: {}, {} in {} ({:.1f} MB/s); written to {}\n", table.Render(),
             manifest.sources.size(), report::FormatBytes(source_bytes),
             report::FormatDuration(seconds), source_bytes / 1e6 / std::max(seconds, 1e-3),
             out_dir);
}

void RunPrepare(PrepareFlags flags) {
  using data::SourceFormat;
  data::PrepareOptions& options = flags.options;
  options.documents.format = flags.format == "text"    ? SourceFormat::kText
                             : flags.format == "jsonl" ? SourceFormat::kJsonl
                                                       : SourceFormat::kAuto;
  options.documents.max_line_bytes = flags.max_line_mb << 20;
  if (flags.threads > 0) SetNumThreads(flags.threads);
  const auto tokenizer = convert::LoadTokenizer(flags.tokenizer);
  const data::TextEncoder encoder = data::EncoderOf(*tokenizer, flags.parse_special);

  std::optional<TemporaryFolder> files;
  if (convert::IsGguf(flags.tokenizer)) {
    files.emplace();
    convert::WriteTokenizerFiles(flags.tokenizer, files->path());
  }
  options.copies = data::TokenizerFiles(files ? files->path() : flags.tokenizer);
  InstallStopHandler();
  report::StatusLine status;
  std::optional<report::Eta> eta;
  options.cancelled = StopRequested;
  options.progress = [&](const data::PrepareProgress& p) {
    if (!eta) eta.emplace(p.total_bytes);
    status.Update(ProgressText(p, &*eta));
  };
  options.note = [&](const std::string& text) { status.Print("note: " + text); };
  if (flags.dry_run) {
    PrintPlan(flags, data::PlanPrepare(options));
    return;
  }
  const double start_s = report::MonotonicSeconds();
  const data::ShardManifest manifest = data::Prepare(options, encoder);
  status.Finish();
  PrintSummary(options.out_dir, manifest, report::MonotonicSeconds() - start_s);
}

}  // namespace

void AddPrepareCommand(CLI::App& app) {
  const auto flags = std::make_shared<PrepareFlags>();
  data::PrepareOptions& options = flags->options;
  CLI::App* command = app.add_subcommand("prepare", "Turn text into packed token shards");
  command
      ->add_option(
          "inputs", options.inputs,
          "Text files, JSON lines (.jsonl), folders of such files, or - for standard input")
      ->required();
  command
      ->add_option("--tokenizer", flags->tokenizer,
                   "Folder with tokenizer.json or tokenizer.model, or .gguf")
      ->required();
  command->add_option("--out-dir", options.out_dir, "Folder to write")->required();
  command->add_flag("--overwrite", options.overwrite, "Replace the shards in --out-dir");
  command->add_option("--format", flags->format, "Of the inputs; auto goes by the file name")
      ->check(CLI::IsMember({"auto", "text", "jsonl"}))
      ->capture_default_str();
  command
      ->add_option("--text-field", options.documents.text_field, "JSON field that holds the text")
      ->capture_default_str();
  command->add_option(
      "--document-separator", options.documents.separator,
      "What parts documents in a text file: a string (\\n for a newline), blank-line, or "
      "/REGEX/ for lines that match as a whole. Without it a file is one document");
  command->add_option("--val-fraction", options.val_fraction, "Share of documents for validation")
      ->check(CLI::Range(0.0, 0.999))
      ->capture_default_str();
  command->add_option("--seed", options.seed, "Of the split")
      ->check(SeedRange())
      ->capture_default_str();
  command->add_option("--shard-tokens", options.shard_tokens, "Tokens per shard file")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--max-line-mb", flags->max_line_mb, "Longest JSON line, in MiB")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 16))
      ->capture_default_str();
  command->add_flag("--parse-special", flags->parse_special,
                    "Text that spells a special token (<|endoftext|>, ...) becomes that token");
  command->add_option("--threads", flags->threads, "Default: all cores")
      ->check(CLI::Range(1, 1024));
  command->add_flag("--dry-run", flags->dry_run, "Print what would be done, write nothing");
  command->footer(
      "Example: detour prepare corpus/ more.jsonl --tokenizer tok/ --out-dir shards/ "
      "--val-fraction 0.02");
  command->callback([flags] { RunPrepare(*flags); });
}

}  // namespace detour::cli
