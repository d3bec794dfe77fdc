// Flags and small helpers that several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "infer/sampler.h"
#include "model/model.h"

namespace detour::cli {

/// --threads and --simd.
struct RuntimeOptions {
  int threads = 0;  ///< 0: all
  std::string simd = "auto";
};
void AddRuntimeOptions(CLI::App& sub, RuntimeOptions* options);
/// Sets threads and SIMD target of the kernels; libtorch's own pool stays unused.
void ApplyRuntimeOptions(const RuntimeOptions& options);

/// The same for a command with a backward pass: kernels and libtorch share libtorch's OpenMP pool.
/// OpenMP's threads would spin between parallel regions, which on a machine that others use too
/// costs several times the run's time; the policy is read when the library is loaded, so the
/// program starts itself again with OMP_WAIT_POLICY=passive, unless the user has set one.
void ApplyTrainingRuntimeOptions(const RuntimeOptions& options);

/// --temp, --top-k, --top-p, --min-p, --repetition-penalty, --seed.
void AddSamplingOptions(CLI::App& sub, infer::SamplingOptions* options);

/// --exit, --exit-threshold, --exit-from.
void AddExitOptions(CLI::App& sub, model::ExitRule* rule);

/// --weights: how a command that serves keeps the matrices.
void AddWeightsOption(CLI::App& sub, std::string* weights);
/// Error("flag.weights") for an unknown name.
model::WeightOptions ServingWeights(const std::string& weights);

/// A flag's check: a finite number in [low, high].
CLI::Validator Number(double low, double high = std::numeric_limits<double>::max());

/// Seeds are stored as JSON integers: [0, 2^63 - 1]. (CLI11 would read -1 as 2^64 - 1.)
CLI::Validator SeedRange();

/// "2048,8192" -> {2048, 8192}. Error("flag") naming `flag` for anything but positive integers.
std::vector<int64_t> ParseLengths(const std::string& flag, const std::string& text);

/// A folder for the time of one command.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

/// Error("flag") if the path given to `flag`, which trains on from a model, is a GGUF file.
void RefuseGguf(const std::string& flag, const std::string& path);

/// The whole of standard input, or of `path` if it is not "-".
std::string ReadInput(const std::string& path);

}  // namespace detour::cli
