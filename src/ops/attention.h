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

/// Entries [begin, end) that a query sees.
struct Prefix {
  int64_t begin = 0, end = 0;
};

/// One mixer call. R rows out of N query; W rows write entries: those R, or all N.
struct MixArgs {
  at::Tensor rows_R;       ///< i32, ascending: the rows that query; undefined: all
  at::Tensor bypass_rows;  ///< i32, ascending: all others, if they take their own value
  at::Tensor positions_W;  ///< i32
  std::vector<RoutedSegment> segments;  ///< of the rows that write
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  bool with_positions = false;  ///< page layout of `store`
  KvStore* store = nullptr;     ///< null: entries live for this call only
};

/// Causal attention of the querying rows among their segment's entries and those its sequence
/// already has in the store (kernels::Attend). q [R, H·K] and k [W, G·K] are rotated. With
/// bypass_rows the answer y [N, H·K] has y[rows_R] = attention and y[bypass_rows] = repeat_kv(v)
/// (DTRNet's linear path; METHODS §1), v is of all N rows, and W = R. Without, the answer is [R,
/// H·K] and v [W, G·K]. Backward: libtorch's flash backward per segment, or blocks of 128 queries
/// where R < W; a store must be null then.
at::Tensor Mix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const MixArgs& args);

/// Attention of queries q [U, H·K] that write nothing, each among the entries of its prefix; an
/// empty prefix gives 0. No gradients.
at::Tensor AttendPrefix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const std::vector<Prefix>& prefixes, int64_t num_heads,
                        int64_t num_kv_heads, int64_t head_dim);

/// Keys of all N rows of a stream, of which only the gated ones were written.
struct GatedKeys {
  at::Tensor k, v;    ///< [N, G·K], k rotated; constants
  at::Tensor gate_N;  ///< 1 where a row wrote its key, else 0; receives the gradient
  at::Tensor rows_R;  ///< i32: the rows that query and wrote
  std::vector<RoutedSegment> segments;  ///< documents, in rows of the stream
};

/// `out` [R, H·K], the attention of queries q among the written keys, itself. In the backward pass
/// each row's gate receives what its key's weight w changes for later queries, at w = gate: Σ_q,h
/// (e_qk / Σ_written e_qj) · dO_q·(v_k − o_q), its own query left out. In blocks of 128 queries; no
/// T×T matrix is stored.
at::Tensor CountKeys(const at::Tensor& out, const at::Tensor& q, const GatedKeys& keys,
                     int64_t num_kv_heads, int64_t head_dim);

/// Each kv head's value repeated for its query heads, [N, G·K] -> [N, H·K].
at::Tensor RepeatKv(const at::Tensor& v, int64_t num_kv_heads, int64_t num_heads);

}  // namespace detour::ops
