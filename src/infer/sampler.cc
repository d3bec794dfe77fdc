#include "infer/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/error.h"
#include "core/rng.h"

namespace detour::infer {

void CheckSamplingOptions(const SamplingOptions& o) {
  const auto check = [](bool ok, const char* flag, const char* expected, double got) {
    if (!ok) Fail("generate.options", "{}: expected {}, got {}", flag, expected, got);
  };
  check(o.temperature >= 0 && std::isfinite(o.temperature), "--temperature", "a number >= 0",
        o.temperature);
  check(o.top_k >= 0, "--top-k", "0 (off) or more", o.top_k);
  check(o.top_p > 0 && o.top_p <= 1, "--top-p", "a number in (0, 1]", o.top_p);
  check(o.min_p >= 0 && o.min_p <= 1, "--min-p", "a number in [0, 1]", o.min_p);
  check(o.repetition_penalty > 0 && std::isfinite(o.repetition_penalty), "--repetition-penalty",
        "a number > 0", o.repetition_penalty);
}

int32_t Sample(std::span<const float> logits_V, std::span<const int32_t> seen,
               const SamplingOptions& options, uint32_t request, uint32_t position) {
  std::vector<double> scores(logits_V.begin(), logits_V.end());
  if (options.repetition_penalty != 1.0) {
    std::vector<int32_t> ids(seen.begin(), seen.end());
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    for (int32_t id : ids) {
      scores[id] = scores[id] > 0 ? scores[id] / options.repetition_penalty
                                  : scores[id] * options.repetition_penalty;
    }
  }
  const auto best = std::max_element(scores.begin(), scores.end());  // the first of equals
  if (options.temperature == 0) return static_cast<int32_t>(best - scores.begin());

  const double max = *best;
  for (double& s : scores) s = std::exp((s - max) / options.temperature);
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto more_probable = [&](int32_t a, int32_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  };
  if (options.top_k > 0 && options.top_k < static_cast<int32_t>(order.size())) {
    std::nth_element(order.begin(), order.begin() + options.top_k, order.end(), more_probable);
    order.resize(options.top_k);
  }
  if (options.top_p < 1) {
    std::sort(order.begin(), order.end(), more_probable);
    double total = 0, sum = 0;
    for (int32_t id : order) total += scores[id];
    size_t keep = 0;
    while (keep < order.size() && (keep == 0 || sum < options.top_p * total)) {
      sum += scores[order[keep++]];
    }
    order.resize(keep);
  }
  // scores are relative to the most probable token, whose score is 1.
  if (options.min_p > 0)
    std::erase_if(order, [&](int32_t id) { return scores[id] < options.min_p; });
  std::sort(order.begin(), order.end());
  double total = 0;
  for (int32_t id : order) total += scores[id];
  double left = Rng(options.seed, RngPurpose::kSample, request).Uniform(position) * total;
  for (int32_t id : order) {
    left -= scores[id];
    if (left < 0) return id;
  }
  return order.back();
}

}  // namespace detour::infer
