#include "infer/measure.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <memory>

#include "infer/sequence.h"
#include "report/status.h"

namespace detour::infer {

namespace {

constexpr int64_t kChunk = 512;

}  // namespace

std::vector<std::vector<LengthFigures>> MeasureLengths(
    const std::vector<const model::Model*>& models, std::span<const int32_t> tokens,
    const std::vector<int64_t>& lengths, int64_t decode_tokens, int repeats) {
  const at::NoGradGuard no_grad;
  std::vector<std::unique_ptr<RaggedCache>> caches;
  int64_t most = static_cast<int64_t>(tokens.size());
  for (const model::Model* m : models) {
    caches.push_back(std::make_unique<RaggedCache>(m->config));
    most = std::min(most, m->config.max_position_embeddings);
  }
  std::vector<std::vector<LengthFigures>> figures(models.size());
  std::vector<double> prefill_seconds(models.size());
  int64_t done = 0;
  for (const int64_t asked : lengths) {
    const int64_t length = std::min(asked, most - decode_tokens);
    if (length <= done) break;
    for (size_t m = 0; m < models.size(); ++m) {
      const double start = report::MonotonicSeconds();
      for (int64_t begin = done; begin < length; begin += kChunk) {
        Feed(*models[m], *caches[m], 0, tokens.subspan(begin, std::min(kChunk, length - begin)),
             begin);
      }
      prefill_seconds[m] += report::MonotonicSeconds() - start;
      figures[m].push_back({length, 0, prefill_seconds[m], 0});
    }
    done = length;
    std::vector<std::vector<double>> rates(models.size());
    for (int r = 0; r < repeats; ++r) {
      for (size_t m = 0; m < models.size(); ++m) {
        const double start = report::MonotonicSeconds();
        for (int64_t t = length; t < length + decode_tokens; ++t) {
          Logits(*models[m], Feed(*models[m], *caches[m], 0, tokens.subspan(t, 1), t));
          // A window's layers have let go of the last chunk of the prompt by then.
          if (t == length) figures[m].back().kv_bytes = caches[m]->bytes();
        }
        rates[m].push_back(static_cast<double>(decode_tokens) /
                           (report::MonotonicSeconds() - start));
        caches[m]->Truncate(0, length);
      }
    }
    for (size_t m = 0; m < models.size(); ++m) {
      std::sort(rates[m].begin(), rates[m].end());
      figures[m].back().decode_tokens_per_s = rates[m][rates[m].size() / 2];
    }
  }
  return figures;
}

}  // namespace detour::infer
