// The mixer's core: which rows attend among which entries of their document, and their gradients.
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
  /// Where every row's entry lives while it is recent, beside those that stay; null: nowhere.
  virtual KvStore* recent() { return nullptr; }
  /// Entries of the sequence before `entry` will not be read again.
  virtual void Forget(int32_t /*sequence*/, int64_t /*entry*/) {}
};

/// Consecutive rows that attend to one another (one document of one sequence).
struct RoutedSegment {
  int64_t begin = 0, end = 0;  ///< rows
  int32_t sequence = 0;
};

/// Entries [begin, end) that a query sees.
struct Prefix {
  int64_t begin = 0, end = 0;
};

/// What all attention operations are told. The W rows that write entries have positions.
struct AttendShape {
  int64_t num_heads = 0;
  kernels::KvLayout layout;
  at::Tensor positions_W;               ///< i32
  std::vector<RoutedSegment> segments;  ///< of the rows that write
  KvStore* store = nullptr;             ///< null: entries live for this call only
};

/// One mixer call. R rows out of N query; W rows write entries: those R, or all N.
struct MixArgs {
  AttendShape shape;
  at::Tensor rows_R;       ///< i32, ascending: the rows that query; undefined: all
  at::Tensor bypass_rows;  ///< i32, ascending: all others, if they take their own value
};

/// Causal attention of the querying rows among their segment's entries and those its sequence
/// already has in the store (kernels::Attend). q [R, H·K] and k [W, G·K] are rotated. With
/// bypass_rows the answer y [N, H·K] has y[rows_R] = attention and y[bypass_rows] = repeat_kv(v)
/// (DTRNet's linear path; METHODS §1), v is of all N rows, and W = R. Without, the answer is [R,
/// H·K] and v [W, G·K]. Backward: libtorch's flash backward per segment, or blocks of 128 queries
/// where R < W; a store must be null then.
at::Tensor Mix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const MixArgs& args);

/// A window of positions, and the first positions of a document.
struct WindowRule {
  int64_t size = 0, sink = 0;  ///< size 0: none
};
/// Recent entries that are kept behind the window: a sequence may be taken back by what the last
/// call added and so many entries more.
inline constexpr int64_t kRollback = 64;
/// Rows of a call by which the window's views are decided; flags of all N rows.
struct WindowRows {
  WindowRule rule;
  std::vector<uint8_t> stays;  ///< its entry stays when it is no longer recent
  std::vector<uint8_t> far;    ///< sees every entry that stays, not the sink's alone
};

/// Attention of all N rows, [N, H·K]. A row at position p sees the entries of its document at
/// positions (p − size, p], and of those that stay the ones before: all of them if it sees far,
/// else those at positions < sink. Entries of rows that do not stay leave the store (its `recent`)
/// behind the window. Backward as Mix's, in blocks of 128 queries. METHODS §6.
at::Tensor MixWindow(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttendShape& shape, const WindowRows& rows);
/// (row, key) pairs that such a call visits, without a store.
int64_t VisitedInWindow(const AttendShape& shape, const WindowRows& rows);

/// Keys by block: a query sees its own block up to itself and `top − 1` earlier blocks.
struct BlockRule {
  int64_t size = 0, top = 0;  ///< entries, a multiple of 16; 0: none
  bool random = false;        ///< scores are hashes of (seed, layer, position, head, block)
  uint64_t seed = 0;
  int32_t layer = 0;
};

/// Attention of all N rows, [N, H·K], each query head among the blocks it chose: those of highest
/// q · Σ keys (MoBA, METHODS §6), the lower one of equals. The layout's block_pages are size / 16.
/// No gradient through the choice. Blocks not chosen are not read but for their sums.
at::Tensor MixBlocks(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttendShape& shape, const BlockRule& rule);

/// Attention of queries q [U, H·K] that write nothing, each among the entries of its prefix; an
/// empty prefix gives 0. Prefixes of one document have one begin, and ends that do not fall. No
/// gradients.
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

/// Each head's K numbers times its weight, [N, H·K].
at::Tensor ScaleHeads(const at::Tensor& heads, const at::Tensor& weight_H);

}  // namespace detour::ops
