// The bypass of a dense model that becomes a routed one: what comes nearest to its attention.
#pragma once

#include <vector>

#include "data/shards.h"
#include "model/model.h"

namespace detour::train {

struct FittedBypass {
  int32_t layer = 0;
  double explained = 0;  ///< of the mean square of what attention adds to a row
};

/// Sets bypass_constant c and bypass_scale a of every attention router that has them so that
/// W_O (a ⊙ v) + c is nearest, by least squares over the rows of `num_tokens` of the split, to what
/// the layer's attention adds when every row attends; documents' first rows, on which attention is
/// unlike any other, are left out. Returns one figure for each such router. No router is asked: the
/// rows are the dense model's. Costs a forward pass and O(N H² D) a layer.
std::vector<FittedBypass> FitBypass(model::Model& model, const data::TokenShards& shards,
                                    int64_t seq_len, int64_t num_tokens);

}  // namespace detour::train
