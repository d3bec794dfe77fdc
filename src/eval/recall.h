// Recall: does the model find, far back in real text, what was said once? Perplexity of prose
// hardly asks that; a router that drops the wrong tokens is found out here.
#pragma once

#include <cstdint>
#include <vector>

#include "data/shards.h"
#include "data/tokenizer.h"
#include "model/model.h"

namespace detour::eval {

struct RecallOptions {
  std::vector<int64_t> lengths;  ///< tokens of a prompt, answers included
  int64_t num_prompts = 16;      ///< of each task and length
  int64_t num_pairs = 8;         ///< of task "pairs"
  uint64_t seed = 1;
};

struct RecallResult {
  int64_t length = 0;
  const char* task = "";    ///< "needle": one fact, one question; "pairs": several of both
  int64_t num_answers = 0;  ///< asked for
  double right = 0;         ///< share of answers whose every token is the likeliest one
  double loss = 0;          ///< mean cross-entropy of a token of the answers, nats
};

/// Facts "The special magic number for CITY is NNNNN." are put at random places into text of the
/// split, and asked for at its end by their own words; an answer is right if greedy decoding would
/// say it, given right answers before it. Same seed, same prompts, whatever the model. One forward
/// pass a prompt, by the serving rule. Error("eval.recall") for lengths that leave no room for text
/// or go beyond the split or the model's context.
std::vector<RecallResult> Recall(const model::Model& model, const data::Tokenizer& tokenizer,
                                 const data::TokenShards& shards, const RecallOptions& options);

}  // namespace detour::eval
