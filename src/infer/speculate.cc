#include "infer/speculate.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/error.h"
#include "infer/sampler.h"
#include "infer/sequence.h"
#include "report/status.h"

namespace detour::infer {

namespace {

class Speculator {
 public:
  Speculator(const model::Model& model, const SpeculateOptions& options, SpeculateStats* stats)
      : model_(model), options_(options), stats_(stats), cache_(model.config) {}

  SpeculateResult Run(const std::vector<int32_t>& prompt,
                      const std::function<bool(int32_t)>& on_token) {
    tokens_ = prompt;
    const double start = report::MonotonicSeconds();
    const auto length = static_cast<int64_t>(prompt.size());
    for (int64_t begin = 0; begin < length - 1; begin += options_.prefill_chunk) {
      const int64_t n = std::min(options_.prefill_chunk, length - 1 - begin);
      Feed(model_, cache_, 0, std::span(tokens_).subspan(begin, n), begin);
    }
    const double decode_start = report::MonotonicSeconds();
    stats_->prefill_seconds += decode_start - start;
    const AnswerLimits limits{
        options_.max_tokens, model_.config.max_position_embeddings, {options_.eos_id}};
    SpeculateResult result;
    while (result.finish_reason.empty()) {
      for (int32_t token : Round()) {
        result.finish_reason = AppendToken(token, limits, on_token, &tokens_, &result.tokens);
        if (!result.finish_reason.empty()) break;
      }
    }
    stats_->decode_seconds += report::MonotonicSeconds() - decode_start;
    stats_->new_tokens += std::ssize(result.tokens);
    return result;
  }

 private:
  /// Logits of tokens [begin, end), through the first `num_layers` layers (-1: all).
  at::Tensor LogitsOf(std::span<const int32_t> tokens, int64_t begin, int64_t end,
                      int32_t num_layers) {
    return Logits(model_,
                  Feed(model_, cache_, 0, tokens.subspan(begin, end - begin), begin, num_layers));
  }

  static int32_t Likeliest(const at::Tensor& logits, int64_t row) {
    return Sample({ops::F32(logits) + row * logits.size(1), static_cast<size_t>(logits.size(1))},
                  {}, {.temperature = 0}, 0, 0);
  }

  /// Drafts, verifies, and returns the tokens that greedy decoding would give next: at least one.
  std::vector<int32_t> Round() {
    const auto n = static_cast<int64_t>(tokens_.size());
    const int64_t room = model_.config.max_position_embeddings - n;
    std::vector<int32_t> drafted = tokens_;
    for (int64_t i = 0; i < std::min(options_.draft_tokens, room); ++i) {
      const auto end = static_cast<int64_t>(drafted.size());
      drafted.push_back(Likeliest(LogitsOf(drafted, end - 1, end, options_.draft_layers), 0));
    }
    cache_.Truncate(0, n - 1);
    const auto end = static_cast<int64_t>(drafted.size());
    const at::Tensor logits = LogitsOf(drafted, n - 1, end, -1);
    std::vector<int32_t> next;
    for (int64_t row = 0; row < end - n + 1; ++row) {
      next.push_back(Likeliest(logits, row));
      if (n + row < end && next.back() != drafted[n + row]) break;
    }
    stats_->passes += 1;
    stats_->drafted += end - n;
    stats_->accepted += std::ssize(next) - 1;
    cache_.Truncate(0, n - 1 + std::ssize(next));
    return next;
  }

  const model::Model& model_;
  const SpeculateOptions& options_;
  SpeculateStats* stats_;
  RaggedCache cache_;
  std::vector<int32_t> tokens_;  // prompt and answer; the cache has all but the last
};

}  // namespace

SpeculateResult Speculate(const model::Model& model, const std::vector<int32_t>& prompt,
                          const SpeculateOptions& options,
                          const std::function<bool(int32_t token)>& on_token,
                          SpeculateStats* stats) {
  const at::NoGradGuard no_grad;
  if (options.draft_layers < 1 || options.draft_layers >= model.config.num_layers) {
    Fail("generate.draft", "--draft-layers: expected 1 to {}, below the model's {} layers, got {}",
         model.config.num_layers - 1, model.config.num_layers, options.draft_layers);
  }
  SpeculateStats ignored;
  return Speculator(model, options, stats ? stats : &ignored).Run(prompt, on_token);
}

}  // namespace detour::infer
