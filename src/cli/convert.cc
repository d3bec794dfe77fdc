// detour convert IN OUT: a model from one format to another.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <memory>
#include <string>

#include "cli/commands.h"
#include "cli/common.h"
#include "convert/gguf_export.h"
#include "convert/hf_export.h"
#include "convert/load.h"
#include "core/error.h"
#include "io/atomic.h"
#include "model/cost.h"
#include "report/table.h"

namespace detour::cli {
namespace {
namespace fs = std::filesystem;

struct Options {
  std::string in, out, to, type = "f32";
  bool overwrite = false, no_tokenizer = false;
  int threads = 0;
};

io::DType DTypeOf(const std::string& type) {
  if (type == "f32") return io::DType::kF32;
  if (type == "f16") return io::DType::kF16;
  if (type == "bf16") return io::DType::kBF16;
  Fail("flag", "--type {}: a Hugging Face directory has f32, f16 or bf16", type);
}

io::GgufType GgufTypeOf(const std::string& type) {
  if (type == "f32") return io::GgufType::kF32;
  if (type == "f16") return io::GgufType::kF16;
  if (type == "q8_0") return io::GgufType::kQ8_0;
  Fail("flag", "--type {}: GGUF files are written as f32, f16 or q8_0", type);
}

/// What would be lost is a model's, or nothing is.
void CheckTarget(const Options& options, bool gguf) {
  const fs::path out = options.out;
  std::error_code error;
  if (!fs::exists(out, error)) return;
  if (fs::equivalent(options.in, out, error)) {
    Fail("convert", "{}: expected another place than the model itself", options.out);
  }
  if (!gguf && fs::is_directory(out) && fs::is_empty(out, error)) return;
  if (!options.overwrite) {
    Fail("convert", "{}: is there already. Hint: --overwrite replaces it", options.out);
  }
  if (gguf ? !fs::is_regular_file(out) : !fs::exists(out / "config.json")) {
    Fail("convert", "{}: --overwrite replaces {}, which this is not", options.out,
         gguf ? "a file" : "a model directory");
  }
}

double SizeOf(const fs::path& path) {
  if (!fs::is_directory(path)) return static_cast<double>(fs::file_size(path));
  double bytes = 0;
  for (const auto& entry : fs::directory_iterator(path)) {
    if (entry.is_regular_file()) bytes += static_cast<double>(entry.file_size());
  }
  return bytes;
}

void Convert(const Options& options) {
  ApplyRuntimeOptions({.threads = options.threads});
  const bool gguf = options.to.empty() ? options.out.ends_with(".gguf") : options.to == "gguf";
  if (gguf) {
    GgufTypeOf(options.type);
  } else {
    DTypeOf(options.type);
  }
  CheckTarget(options, gguf);
  model::Model model = convert::LoadModel(options.in);
  // What a killed convert left there is as large as a model.
  io::CleanTemporaries(fs::absolute(options.out).parent_path().string());
  if (gguf) {
    convert::WriteGgufModel(model, options.in, options.out,
                            {.type = GgufTypeOf(options.type), .tokenizer = !options.no_tokenizer});
  } else {
    io::AtomicDir dir(options.out);
    convert::WriteHfDirectory(model, options.in, dir.path(),
                              {.dtype = DTypeOf(options.type), .tokenizer = !options.no_tokenizer});
    dir.Commit();
  }
  fmt::print("{}: method {}, {} parameters as {}, {}\n", options.out, MethodName(model.config),
             report::FormatCount(static_cast<double>(model::ParameterCount(model.config))),
             options.type, report::FormatBytes(SizeOf(options.out)));
}

}  // namespace

void AddConvertCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand(
      "convert", "A model from a Hugging Face directory or GGUF file to the other, or to f16");
  sub->add_option(
         "in", options->in,
         "Hugging Face directory (dense or routed; the public DTRNet code's too), or .gguf")
      ->required();
  sub->add_option("out", options->out, "Directory or .gguf file to write")->required();
  sub->add_option("--to", options->to,
                  "hf: a directory that transformers loads (a routed one brings its Python files); "
                  "gguf: dense models of the Llama family. Default: by OUT's suffix")
      ->check(CLI::IsMember({"hf", "gguf"}));
  sub->add_option("--type", options->type, "Of the weights: f32, f16, bf16 (hf), q8_0 (gguf)")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "q8_0"}))
      ->capture_default_str();
  sub->add_flag("--no-tokenizer", options->no_tokenizer, "Weights and config only");
  sub->add_flag("--overwrite", options->overwrite, "Replace OUT if it is there");
  sub->add_option("--threads", options->threads, "Threads; 0: as many as the machine has")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  sub->footer(
      "Example:\n  detour convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2/\n"
      "  detour convert out/dense/latest dense.gguf --type q8_0");
  sub->callback([options] { Convert(*options); });
}

}  // namespace detour::cli
