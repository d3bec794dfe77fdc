// Packed shards -> batches: the only place where [B,T] turns into rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "data/shards.h"
#include "routing/plan.h"

namespace detour::eval {

struct Batch {
  at::Tensor ids_N, targets_N;  ///< i32; a target is the next token
  routing::Stream stream;
  int64_t first_row = 0;  ///< of row 0 within the step's global batch
};

/// Sequences that begin at the tokens `firsts`, seq_len rows each. With `document_attention` each
/// document of a sequence is its own segment with positions from 0; the target after a document's
/// last token is the next document's first token, as in packed pre-training.
Batch MakeBatch(const data::TokenShards& shards, std::span<const int64_t> firsts, int64_t seq_len,
                bool document_attention);

}  // namespace detour::eval
