#include "eval/perplexity.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"
#include "eval/batch.h"
#include "ops/loss.h"
#include "report/status.h"

namespace detour::eval {

namespace {

struct LayerSums {
  double routed = 0, entropy = 0, min_margin = 0.5;
  std::vector<double> routed_at = std::vector<double>(kPositionBuckets);
};

/// Rows of a batch are whole sequences of seq_len: row % seq_len is the place in the sequence.
void AddPlan(const routing::Plan& plan, int64_t num_rows, int64_t seq_len, LayerSums* sums) {
  const std::vector<uint8_t> routed = RoutedFlags(plan, num_rows);
  const float* p = ops::F32(plan.scores_N2);
  for (int64_t n = 0; n < num_rows; ++n) {
    const double a = p[2 * n];
    if (a > 0 && a < 1) sums->entropy -= a * std::log2(a) + (1 - a) * std::log2(1 - a);
    sums->min_margin = std::min(sums->min_margin, std::abs(a - 0.5));
    if (!routed[n]) continue;
    sums->routed += 1;
    sums->routed_at[(n % seq_len) * kPositionBuckets / seq_len] += 1;
  }
}

}  // namespace

EvalResult Evaluate(const model::Model& model, const data::TokenShards& shards,
                    const EvalOptions& options) {
  const at::NoGradGuard no_grad;
  const double start = report::MonotonicSeconds();
  if (shards.num_tokens() < 2) Fail("eval", "the split has fewer than 2 tokens");
  if (shards.vocab_size() != model.config.vocab_size) {
    Fail("eval", "the data were made with a vocabulary of {}, the model has {}",
         shards.vocab_size(), model.config.vocab_size);
  }
  if (options.seq_len > model.config.max_position_embeddings) {
    Fail("eval", "--seq-len {} is beyond the model's context of {}", options.seq_len,
         model.config.max_position_embeddings);
  }
  const int64_t seq_len = std::min(options.seq_len, shards.num_tokens() - 1);
  int64_t num_sequences = (shards.num_tokens() - 1) / seq_len;
  if (options.max_tokens > 0) {
    num_sequences = std::clamp<int64_t>(options.max_tokens / seq_len, 1, num_sequences);
  }
  EvalResult result;
  std::vector<LayerSums> sums(model.layers.size());
  std::vector<double> losses;
  for (int64_t s = 0; s < num_sequences; s += options.micro_batch_size) {
    std::vector<int64_t> firsts;
    for (int64_t i = s; i < std::min(s + options.micro_batch_size, num_sequences); ++i) {
      firsts.push_back(i * seq_len);
    }
    const Batch batch = MakeBatch(shards, firsts, seq_len, options.document_attention);
    std::vector<routing::Plan> plans;
    const at::Tensor h = Forward(model, batch.ids_N, batch.stream, {.plans = &plans});
    at::Tensor loss_N;
    ops::LinearCrossEntropy(h, model.head, batch.targets_N, 1.0, &loss_N);
    for (size_t i = 0; i < firsts.size(); ++i) {
      const float* loss = ops::F32(loss_N) + i * seq_len;
      double sum = 0;
      for (int64_t t = 0; t < seq_len; ++t) sum += loss[t];
      losses.push_back(sum / static_cast<double>(seq_len));
    }
    for (size_t l = 0; l < plans.size(); ++l) {
      if (model.layers[l].router) AddPlan(plans[l], h.size(0), seq_len, &sums[l]);
    }
  }

  const auto n = static_cast<double>(losses.size());
  result.num_sequences = num_sequences;
  result.num_tokens = num_sequences * seq_len;
  for (double loss : losses) result.loss += loss / n;
  double variance = 0;
  for (double loss : losses) variance += (loss - result.loss) * (loss - result.loss);
  result.loss_stderr = n > 1 ? std::sqrt(variance / (n - 1) / n) : std::nan("");
  result.perplexity = std::exp(result.loss);
  result.bits_per_byte = result.loss / std::numbers::ln2 *
                         static_cast<double>(shards.num_tokens()) /
                         static_cast<double>(std::max<int64_t>(shards.text_bytes(), 1));
  int num_routed_layers = 0;
  const auto tokens = static_cast<double>(result.num_tokens);
  for (size_t l = 0; l < model.layers.size(); ++l) {
    LayerRouting r;
    if (model.layers[l].router) {
      r.routed_layer = true;
      r.share = sums[l].routed / tokens;
      r.entropy_bits = sums[l].entropy / tokens;
      r.min_margin = sums[l].min_margin;
      for (double routed : sums[l].routed_at) {
        r.share_by_position.push_back(routed * kPositionBuckets / tokens);
      }
      result.share_routed += r.share;
      ++num_routed_layers;
    }
    result.layers.push_back(std::move(r));
  }
  if (num_routed_layers > 0) result.share_routed /= num_routed_layers;
  result.seconds = report::MonotonicSeconds() - start;
  return result;
}

}  // namespace detour::eval
