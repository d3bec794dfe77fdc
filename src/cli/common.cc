#include "cli/common.h"

#include <charconv>
#include <iostream>
#include <iterator>

#include "core/error.h"
#include "core/threads.h"
#include "io/atomic.h"
#include "kernels/kernels.h"

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

std::string ReadInput(const std::string& path) {
  if (path != "-") return io::ReadFile(path);
  return std::string(std::istreambuf_iterator<char>(std::cin), {});
}

}  // namespace detour::cli
