// A sequence that is asked again and again with more behind it, or with another end: only what is
// new runs through the model.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "infer/ragged_cache.h"
#include "model/model.h"

namespace detour::infer {

/// Not thread-safe.
class PrefixCache {
 public:
  /// `model` must outlive this.
  PrefixCache(const model::Model& model, int64_t prefill_chunk);

  /// Logits [1, V] behind the last of `ids` (at least one, all in the model's context): the same
  /// bits as from an empty cache. The cache keeps the tokens that `ids` share with the last call's
  /// from the start on; where it cannot be taken back that far (a window moved on), it starts
  /// afresh. `go_on`, if any, is asked before each chunk: false gives an undefined tensor, and the
  /// chunks that have run stay.
  at::Tensor Next(std::span<const int32_t> ids, const std::function<bool()>& go_on = {});
  void Clear();

  /// Tokens whose entries the cache has.
  int64_t num_tokens() const { return std::ssize(ids_); }
  /// Since the beginning: tokens that ran through the model, and per layer those that attended.
  int64_t tokens_run() const { return tokens_run_; }
  const std::vector<int64_t>& attended_by_layer() const { return attended_by_layer_; }
  int64_t bytes() const { return cache_.bytes(); }

 private:
  at::Tensor Run(std::span<const int32_t> ids);

  const model::Model& model_;
  const int64_t prefill_chunk_;
  RaggedCache cache_;
  std::vector<int32_t> ids_;  // in the cache
  int64_t tokens_run_ = 0;
  std::vector<int64_t> attended_by_layer_;
};

}  // namespace detour::infer
