#include "cli/common.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <iterator>

#include "convert/load.h"
#include "core/error.h"
#include "core/threads.h"
#include "io/atomic.h"
#include "kernels/kernels.h"
#include "ops/torch_threads.h"

namespace detour::cli {

void AddRuntimeOptions(CLI::App& sub, RuntimeOptions* options) {
  sub.add_option("--threads", options->threads, "Threads; 0: as many as the machine has")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  sub.add_option("--simd", options->simd, "Instruction set: auto, avx2 or avx512 (equal results)")
      ->capture_default_str();
}

void ApplyRuntimeOptions(const RuntimeOptions& options) {
  kernels::SetSimd(kernels::ParseSimd(options.simd));
  if (options.threads > 0) SetNumThreads(options.threads);
  at::set_num_threads(1);
}

void AddWeightsOption(CLI::App& sub, std::string* weights) {
  sub.add_option("--weights", *weights,
                 "Matrices kept as f32, bf16, q8, q4 or q4min (blocks of 32, inputs as 8 bits); or "
                 "stored: what a GGUF file has in Q8_0, Q4_0 or Q4_1 stays in it")
      ->capture_default_str();
}

model::WeightOptions ServingWeights(const std::string& weights) {
  if (weights == "stored") return {.compact = true, .as_stored = true};
  return {.compact = true, .format = kernels::ParseWeightFormat(weights)};
}

void ApplyTrainingRuntimeOptions(const RuntimeOptions& options) {
  if (!std::getenv("OMP_WAIT_POLICY") && !std::getenv("GOMP_SPINCOUNT")) {
    setenv("OMP_WAIT_POLICY", "passive", 0);
    const std::string arguments = io::ReadFile("/proc/self/cmdline");
    std::vector<char*> argv;
    for (size_t i = 0; i < arguments.size(); i = arguments.find('\0', i) + 1) {
      argv.push_back(const_cast<char*>(arguments.c_str() + i));
    }
    argv.push_back(nullptr);
    execv("/proc/self/exe", argv.data());  // where that fails, spinning threads will do
  }
  kernels::SetSimd(kernels::ParseSimd(options.simd));
  if (options.threads > 0) SetNumThreads(options.threads);
  ops::InstallTorchThreads();
}

CLI::Validator Number(double low, double high) {
  const std::string range = high == std::numeric_limits<double>::max()
                                ? fmt::format("a number of at least {}", low)
                                : fmt::format("a number in [{}, {}]", low, high);
  return CLI::Validator(
      [=](std::string& text) {
        double value = 0;
        const bool ok = CLI::detail::lexical_cast(text, value) && std::isfinite(value) &&
                        value >= low && value <= high;
        return ok ? std::string() : fmt::format("expected {}, got {}", range, text);
      },
      "");
}

void AddSamplingOptions(CLI::App& sub, infer::SamplingOptions* options) {
  sub.add_option("--temp,--temperature", options->temperature, "0: always the likeliest token")
      ->capture_default_str();
  sub.add_option("--top-k", options->top_k, "Sample among the k likeliest; 0: all")
      ->capture_default_str();
  sub.add_option("--top-p", options->top_p, "Sample among the likeliest with this joint share")
      ->capture_default_str();
  sub.add_option("--min-p", options->min_p, "… at least this likely, relative to the likeliest")
      ->capture_default_str();
  sub.add_option("--repetition-penalty", options->repetition_penalty,
                 "Above 1: tokens seen before become less likely")
      ->capture_default_str();
  sub.add_option("--seed", options->seed, "Of the sampler")
      ->check(SeedRange())
      ->capture_default_str();
}

void AddExitOptions(CLI::App& sub, model::ExitRule* rule) {
  sub.add_option_function<std::string>(
      "--exit", [rule](const std::string& name) { rule->kind = model::ParseExitKind(name); },
      "Confidence exit: margin (of the two likeliest tokens) or state (cosine of a layer's input "
      "and output)");
  sub.add_option("--exit-threshold", rule->threshold, "Confidence at which a token stops")
      ->check(Number(0, 1))
      ->capture_default_str();
  sub.add_option("--exit-from", rule->first_layer, "First layer after which a token may stop")
      ->check(CLI::Range(0, 1 << 16))
      ->capture_default_str();
}

CLI::Validator SeedRange() {
  return CLI::Range(uint64_t{0}, static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
}

std::vector<int64_t> ParseLengths(const std::string& flag, const std::string& text) {
  std::vector<int64_t> lengths;
  const char* p = text.data();
  const char* const end = p + text.size();
  while (true) {
    int64_t value = 0;
    const auto [next, error] = std::from_chars(p, end, value);
    if (error != std::errc() || value < 1 || value > (int64_t{1} << 26) ||
        (next != end && *next != ',')) {
      Fail("flag", "{}: expected lengths such as 2048,8192, got \"{}\"", flag, text);
    }
    lengths.push_back(value);
    if (next == end) return lengths;
    p = next + 1;
  }
}

TemporaryFolder::TemporaryFolder() {
  std::string pattern = std::filesystem::temp_directory_path() / "detour-XXXXXX";
  if (!mkdtemp(pattern.data())) Fail("cli", "no folder could be made in {}", pattern);
  path_ = pattern;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void RefuseGguf(const std::string& flag, const std::string& path) {
  if (!convert::IsGguf(path)) return;
  Fail("flag", "{}: expected a model directory, got the GGUF file {}. Hint: detour convert {} DIR",
       flag, path, path);
}

std::string ReadInput(const std::string& path) {
  if (path != "-") return io::ReadFile(path);
  return std::string(std::istreambuf_iterator<char>(std::cin), {});
}

}  // namespace detour::cli
