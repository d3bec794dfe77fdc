// Logits and routing of given token sequences, by each of the ways the engine can run them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/cost.h"
#include "model/model.h"

namespace detour::infer {

enum class ScoreMode { kFull, kIncremental, kChunked };
ScoreMode ParseScoreMode(const std::string& name);  ///< Error("flag.mode")

struct Scores {
  /// What one router said of one sequence; zeros for tokens that did not reach it.
  struct Route {
    std::vector<float> probs;     ///< [T, ways]
    std::vector<uint8_t> routed;  ///< [T]: took the span
  };
  std::vector<model::RouterId> routers;
  std::vector<int64_t> ways;               ///< by router: 2, or the number of experts
  std::vector<std::vector<float>> logits;  ///< [sequence][T·V]
  std::vector<std::vector<Route>> routes;  ///< [sequence][router]
  std::vector<model::LayerRows> rows;      ///< work of each layer over all sequences; kFull only
};

/// All sequences as one ragged batch. kFull: one forward pass without a cache; kIncremental: one
/// token of each sequence a pass; kChunked: `chunk` tokens of each. The bits do not depend on the
/// mode. Error("score") for ids out of range and sequences beyond the model's context.
Scores Score(const model::Model& model, const std::vector<std::vector<int32_t>>& sequences,
             ScoreMode mode, int64_t chunk = 64, const model::ExitRule& exit = {});

}  // namespace detour::infer
