#include "eval/perplexity.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"
#include "core/op_counter.h"
#include "eval/batch.h"
#include "ops/loss.h"
#include "report/status.h"

namespace detour::eval {

namespace {

struct RouterSums {
  double routed = 0, entropy = 0, min_margin = 0.5, agreed = 0;
  std::vector<double> routed_at = std::vector<double>(kPositionBuckets);
  std::vector<double> choices;
};

/// Rows of a batch are whole sequences of seq_len: row % seq_len is the place in the sequence.
void AddPlan(const routing::OuterPlan& outer, int64_t num_rows, int64_t seq_len, RouterSums* sums) {
  const routing::Plan& plan = *outer.plan;
  const at::Tensor scores = plan.scores_NC.contiguous();
  const int64_t ways = scores.size(1);
  const float* p = ops::F32(scores);
  for (int64_t i = 0; i < scores.numel(); ++i) {
    if (p[i] > 0 && p[i] < 1) sums->entropy -= p[i] * std::log2(static_cast<double>(p[i]));
  }
  for (int64_t n = 0; n < plan.num_rows && plan.experts.empty(); ++n) {
    sums->min_margin = std::min(sums->min_margin, std::abs(p[ways * n] - 0.5));
  }
  sums->choices.resize(plan.choices.size());
  for (size_t e = 0; e < plan.choices.size(); ++e) {
    sums->choices[e] += static_cast<double>(plan.choices[e]);
  }
  sums->agreed += static_cast<double>(plan.causal_agreed >= 0 ? plan.causal_agreed : plan.num_rows);
  const std::vector<uint8_t> routed = OuterFlags(outer, num_rows);
  for (int64_t n = 0; n < num_rows; ++n) {
    if (!routed[n]) continue;
    sums->routed += 1;
    sums->routed_at[(n % seq_len) * kPositionBuckets / seq_len] += 1;
  }
}

RouterFigures Figures(const model::RouterId& id, const RouterSums& sums, double num_tokens) {
  RouterFigures f{.id = id};
  f.experts = !sums.choices.empty();
  f.share = sums.routed / num_tokens;
  f.entropy_bits = sums.entropy / num_tokens;
  f.min_margin = sums.min_margin;
  f.causal_agreement = sums.agreed / num_tokens;
  for (double routed : sums.routed_at) {
    f.share_by_position.push_back(routed * kPositionBuckets / num_tokens);
  }
  double all = 0;
  for (double c : sums.choices) all += c;
  for (double c : sums.choices) f.expert_shares.push_back(c / std::max(all, 1.0));
  return f;
}

}  // namespace

EvalResult Evaluate(const model::Model& model, const data::TokenShards& shards,
                    const EvalOptions& options) {
  const at::NoGradGuard no_grad;
  const double start = report::MonotonicSeconds();
  const int64_t flops_before = GlobalOpCounter().Total();
  CheckExit(model, options.exit);
  if (shards.num_tokens() < 2) Fail("eval", "the split has fewer than 2 tokens");
  // Real models often have more rows than their tokenizer has tokens.
  if (shards.vocab_size() > model.config.vocab_size) {
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
  const std::vector<model::RouterId> routers = model::Routers(model.config);
  std::vector<RouterSums> sums(routers.size());
  const routing::Mode mode =
      options.teacher_forced ? routing::Mode::kTeacherForced : routing::Mode::kInfer;
  std::vector<double> losses;
  double layer_rows = 0;
  for (int64_t s = 0; s < num_sequences; s += options.micro_batch_size) {
    std::vector<int64_t> firsts;
    for (int64_t i = s; i < std::min(s + options.micro_batch_size, num_sequences); ++i) {
      firsts.push_back(i * seq_len);
    }
    const Batch batch = MakeBatch(shards, firsts, seq_len, options.document_attention);
    std::vector<routing::LayerPlans> plans;
    const at::Tensor h =
        Forward(model, batch.ids_N, batch.stream,
                {.mode = mode, .knobs = options.knobs, .plans = &plans, .exit = options.exit});
    for (const routing::LayerPlans& p : plans) {
      const bool exited = p.ffn.decided() && options.exit.kind != model::ExitRule::Kind::kNone;
      layer_rows += static_cast<double>(exited ? p.ffn.NumRouted() : h.size(0));
    }
    at::Tensor loss_N;
    ops::LinearCrossEntropy(h, model.head, batch.targets_N, 1.0, &loss_N);
    for (size_t i = 0; i < firsts.size(); ++i) {
      const float* loss = ops::F32(loss_N) + i * seq_len;
      double sum = 0;
      for (int64_t t = 0; t < seq_len; ++t) sum += loss[t];
      losses.push_back(sum / static_cast<double>(seq_len));
    }
    for (size_t r = 0; r < routers.size(); ++r) {
      const routing::OuterPlan outer = PlanOf(plans[routers[r].layer], routers[r].site);
      if (outer.plan->decided()) AddPlan(outer, h.size(0), seq_len, &sums[r]);
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
  double shares = 0, gates = 0;
  for (size_t r = 0; r < routers.size(); ++r) {
    result.routers.push_back(Figures(routers[r], sums[r], static_cast<double>(result.num_tokens)));
    if (result.routers.back().experts) continue;
    shares += result.routers.back().share;
    ++gates;
  }
  if (gates > 0) result.share_routed = shares / gates;
  result.mean_layers = layer_rows / static_cast<double>(result.num_tokens);
  result.flops_per_token = static_cast<double>(GlobalOpCounter().Total() - flops_before) /
                           static_cast<double>(result.num_tokens);
  result.seconds = report::MonotonicSeconds() - start;
  return result;
}

}  // namespace detour::eval
