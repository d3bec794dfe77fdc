// Logits -> one token. The random number depends on (seed, request, position) alone.
#pragma once

#include <cstdint>
#include <span>

namespace detour::infer {

struct SamplingOptions {
  double temperature = 0.8;  ///< 0: the most probable token
  int32_t top_k = 0;         ///< 0: all
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty =
      1.0;  ///< > 1: tokens seen before become less probable (arXiv 1909.05858)
  uint64_t seed = 42;
};

/// Error("generate.options") if a value is out of range.
void CheckSamplingOptions(const SamplingOptions& options);

/// Applies, in transformers' order: repetition penalty over `seen`, temperature, top-k, top-p,
/// min-p; then draws. Ties go to the lower id. At temperature 0 only the penalty applies. O(V log
/// V) with top-p, else O(V).
int32_t Sample(std::span<const float> logits_V, std::span<const int32_t> seen,
               const SamplingOptions& options, uint32_t request, uint32_t position);

}  // namespace detour::infer
