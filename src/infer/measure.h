// What a model's cache and decode cost at given context lengths, measured.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/model.h"

namespace detour::infer {

struct LengthFigures {
  int64_t length = 0;
  int64_t kv_bytes = 0;            ///< pages handed out × page size, at the first token decoded
  double prefill_seconds = 0;      ///< from an empty cache to this length
  double decode_tokens_per_s = 0;  ///< one sequence, median over `repeats`
};

/// Prefills `tokens` into one cache per model and, at each of `lengths` (ascending), takes the
/// figures; decode runs of `decode_tokens` steps alternate between the models and are truncated
/// away. Result: [model][length]. A length beyond the tokens or a model's context is cut to what
/// leaves room to decode, once.
std::vector<std::vector<LengthFigures>> MeasureLengths(
    const std::vector<const model::Model*>& models, std::span<const int32_t> tokens,
    const std::vector<int64_t>& lengths, int64_t decode_tokens = 16, int repeats = 5);

}  // namespace detour::infer
