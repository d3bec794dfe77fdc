// What the attention operations share: pages of one call, the kernel's call, and the backward pass
// in blocks of queries.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

#include "ops/attention.h"

namespace detour::ops {

inline constexpr int64_t kBlockQueries = 128;

/// Pages for one call: what training and full forward passes without a cache attend to. Every
/// Extend begins a new sequence.
class CallPages : public KvStore {
 public:
  explicit CallPages(const kernels::KvLayout& layout, bool with_recent = false)
      : layout_(layout), recent_(with_recent ? std::make_unique<CallPages>(layout) : nullptr) {}
  Pages Extend(int32_t sequence, int64_t num_entries) override;
  KvStore* recent() override { return recent_.get(); }

 private:
  kernels::KvLayout layout_;
  std::unique_ptr<CallPages> recent_;
  std::vector<at::Tensor> buffers_;
  std::vector<std::unique_ptr<std::vector<float*>>> tables_;
};

/// Writes the entries of a segment's rows to `store`.
KvStore::Pages WriteSegment(const AttendShape& shape, const RoutedSegment& segment,
                            const at::Tensor& k, const at::Tensor& v, KvStore& store);

/// kernels::Attend at the scale 1 / sqrt(K); out [R, H·K], and lse [R, H] if it is defined.
void RunAttend(const AttendShape& shape, const at::Tensor& q,
               const std::vector<kernels::AttendSegment>& segments, at::Tensor& out,
               const at::Tensor& lse);

/// [rows, heads·K] -> [G, heads/G · rows, K] of rows [b, e), and [rows, G·K] -> [G, rows, K].
at::Tensor QueryHeads(const at::Tensor& t, int64_t b, int64_t e, int64_t num_kv_heads,
                      int64_t head_dim);
at::Tensor EntryHeads(const at::Tensor& t, int64_t begin, int64_t end, int64_t num_kv_heads);

/// Which of the entries [begin, end) the queries [b, e) see: a mask that broadcasts to [G, H/G, e −
/// b, end − begin].
using SeenFn = std::function<at::Tensor(int64_t b, int64_t e, int64_t begin, int64_t end)>;

/// Gradients of attention, per segment written into dq [R, H·K] and added to dk, dv [W, G·K].
struct AttentionGradients {
  const at::Tensor &q, &k, &v, &out, &lse, &dout;
  int64_t num_kv_heads;
  at::Tensor dq, dk, dv;

  /// Queries [b, e) are the written rows [b, e), causal: libtorch's flash backward.
  void Square(int64_t b, int64_t e);
  /// Queries [b, e) among the entries [begin, end).
  void Masked(int64_t b, int64_t e, int64_t begin, int64_t end, const SeenFn& seen);
};

/// Sum over each kv head's query heads: [rows, H·K] -> [rows, G·K].
at::Tensor SumGroups(const at::Tensor& x, int64_t num_kv_heads, int64_t head_dim);

/// Attention in which every row queries and writes: `run` fills out [N, H·K] and, if it is defined,
/// lse [N, H], and says who saw what for the backward pass.
using RunFn = std::function<SeenFn(at::Tensor& out, const at::Tensor& lse)>;
at::Tensor MixSeen(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const AttendShape& shape, const RunFn& run);

}  // namespace detour::ops
