#include "infer/prefix.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/error.h"
#include "infer/sequence.h"

namespace detour::infer {

PrefixCache::PrefixCache(const model::Model& model, int64_t prefill_chunk)
    : model_(model),
      prefill_chunk_(prefill_chunk),
      cache_(model.config),
      attended_by_layer_(model.layers.size()) {}

void PrefixCache::Clear() {
  cache_.Remove(0);
  ids_.clear();
}

/// Hidden states of more tokens behind those in the cache.
at::Tensor PrefixCache::Run(std::span<const int32_t> ids) {
  std::vector<routing::LayerPlans> plans;
  at::Tensor h;
  try {
    h = Feed(model_, cache_, 0, ids, num_tokens(), -1, &plans);
  } catch (...) {
    Clear();  // some layers may have taken the entries
    throw;
  }
  ids_.insert(ids_.end(), ids.begin(), ids.end());
  tokens_run_ += std::ssize(ids);
  for (size_t l = 0; l < plans.size(); ++l) {
    const std::vector<uint8_t> flags = AttendingRows(plans[l], std::ssize(ids));
    attended_by_layer_[l] += std::ranges::count(flags, 1);
  }
  return h;
}

at::Tensor PrefixCache::Next(std::span<const int32_t> ids, const std::function<bool()>& go_on) {
  DETOUR_CHECK(!ids.empty(), "no tokens");
  const at::NoGradGuard no_grad;
  // The last token runs in any case: its logits are asked for.
  const auto differ = std::ranges::mismatch(ids_, ids.first(ids.size() - 1)).in1;
  const int64_t common = differ - ids_.begin();
  if (common < num_tokens()) {
    if (cache_.CanTruncate(0, common)) {
      cache_.Truncate(0, common);
      ids_.resize(common);
    } else {
      Clear();
    }
  }
  at::Tensor h;
  while (num_tokens() < std::ssize(ids)) {
    if (go_on && !go_on()) return {};
    const int64_t n = std::min(prefill_chunk_, std::ssize(ids) - num_tokens());
    h = Run(ids.subspan(num_tokens(), n));
  }
  return Logits(model_, h.slice(0, h.size(0) - 1));
}

}  // namespace detour::infer
