// The mixer's core: routed rows attend among the entries of their sequence, bypassed rows take
// their own value.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace detour::ops {

/// Where one layer's keys and values of a sequence live. Implemented by the inference cache;
/// training needs none.
class KvStore {
 public:
  struct Pages {
    float* const* pages;  ///< page table that covers the old and the new entries
    int64_t first_entry;  ///< entries that were there before
  };
  virtual ~KvStore() = default;
  /// Room for `num_entries` more entries of `sequence`. Pages stay valid until the sequence is
  /// extended or truncated again.
  virtual Pages Extend(int32_t sequence, int64_t num_entries) = 0;
};

/// Consecutive entries of the routed rows that attend to one another (one document of one
/// sequence).
struct RoutedSegment {
  int64_t begin = 0, end = 0;  ///< range of routed rows (indices into rows_R)
  int32_t sequence = 0;
};

/// One mixer call. R routed rows out of N.
struct MixArgs {
  at::Tensor rows_R;       ///< i32, ascending: the rows that attend and that write K,V
  at::Tensor bypass_rows;  ///< i32, ascending: all others
  at::Tensor positions_R;  ///< i32
  std::vector<RoutedSegment> segments;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  bool with_positions = false;  ///< page layout of `store`
  KvStore* store = nullptr;     ///< null: entries live for this call only
};

/// y [N, H·K]: y[rows_R] = causal attention among each segment's rows and the entries its sequence
/// already has in the store (kernels::Attend); y[bypass_rows] = repeat_kv(v) (DTRNet's linear path;
/// METHODS §1). q [R, H·K] and k [R, G·K] are rotated, v [N, G·K] is of all rows. Backward:
/// libtorch's flash backward per segment; a store must be null then.
at::Tensor Mix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const MixArgs& args);

}  // namespace detour::ops
