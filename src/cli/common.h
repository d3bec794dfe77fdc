// Flags and small helpers that several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "model/model.h"

namespace detour::cli {

/// --threads and --simd.
struct RuntimeOptions {
  int threads = 0;  ///< 0: all
  std::string simd = "auto";
};
void AddRuntimeOptions(CLI::App& sub, RuntimeOptions* options);
/// Sets threads and SIMD target for the process.
void ApplyRuntimeOptions(const RuntimeOptions& options);

/// "2048,8192" -> {2048, 8192}. Error("flag") naming `flag` for anything but positive integers.
std::vector<int64_t> ParseLengths(const std::string& flag, const std::string& text);

/// The whole of standard input, or of `path` if it is not "-".
std::string ReadInput(const std::string& path);

}  // namespace detour::cli
