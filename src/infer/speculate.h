// Self-speculative greedy decoding (LayerSkip, METHODS §5): the first layers draft, all layers
// verify. The answer is that of greedy decoding, token for token.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "model/model.h"

namespace detour::infer {

struct SpeculateOptions {
  int32_t draft_layers = 1;  ///< below the model's number of layers
  int64_t draft_tokens = 4;  ///< tokens drafted before a verification
  int64_t max_tokens = 128;
  int64_t prefill_chunk = 512;
  int32_t eos_id = -1;  ///< ends the answer; -1: none
};

struct SpeculateStats {
  int64_t drafted = 0, accepted = 0, passes = 0;  ///< passes of all layers after the prompt
  double prefill_seconds = 0, decode_seconds = 0;
  int64_t new_tokens = 0;
};

struct SpeculateResult {
  std::vector<int32_t> tokens;
  std::string finish_reason;  ///< "eos", "length", "context", "stopped"
};

/// Continues one prompt (checked by the caller as Generate checks it). `on_token` as in Generate:
/// false stops. Error("generate.draft") for draft_layers out of range.
SpeculateResult Speculate(const model::Model& model, const std::vector<int32_t>& prompt,
                          const SpeculateOptions& options,
                          const std::function<bool(int32_t token)>& on_token,
                          SpeculateStats* stats);

}  // namespace detour::infer
