// Loss of a model on packed text, with what its routers did.
#pragma once

#include <cstdint>
#include <vector>

#include "data/shards.h"
#include "model/model.h"

namespace detour::eval {

struct EvalOptions {
  int64_t seq_len = 1024;
  int64_t max_tokens = 0;        ///< 0: the whole split
  int64_t micro_batch_size = 8;  ///< sequences per forward pass; changes no figure
  bool document_attention = true;
  routing::Knobs knobs;
  model::ExitRule exit;
  bool teacher_forced = false;  ///< decide by the training rule, which may look ahead
};

inline constexpr int64_t kPositionBuckets = 8;

/// What one router did.
struct RouterFigures {
  model::RouterId id;
  bool experts = false;
  double share = 1;                       ///< of all tokens that took the span
  double entropy_bits = 0;                ///< mean entropy of its probabilities
  double min_margin = 0;                  ///< gates: min |p − 0.5| over all tokens
  std::vector<double> share_by_position;  ///< kPositionBuckets equal parts of seq_len
  std::vector<double> expert_shares;      ///< of all choices, by expert
  double causal_agreement = 1;            ///< of tokens on which the rule that serves agrees
};

struct EvalResult {
  int64_t num_tokens = 0, num_sequences = 0;
  double loss = 0;         ///< mean next-token cross-entropy, nats
  double loss_stderr = 0;  ///< of the mean, sequences as independent samples
  double perplexity = 0;
  double bits_per_byte = 0;  ///< loss over the mean bytes per token of the split
  std::vector<RouterFigures> routers;
  double share_routed = 1;  ///< mean share over all gates
  double seconds = 0;
  double mean_layers = 0;      ///< layers that a token's row went through
  double flops_per_token = 0;  ///< forward, counted where executed, head in
};

/// Non-overlapping sequences of seq_len from the begin of the split; a last piece that is shorter
/// is left out, but a split shorter than one sequence is evaluated with a shorter one. Serving
/// rules: no fallback, no aux term.
EvalResult Evaluate(const model::Model& model, const data::TokenShards& shards,
                    const EvalOptions& options);

}  // namespace detour::eval
