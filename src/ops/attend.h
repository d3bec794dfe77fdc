// What the attention operations share: pages of one call, and the kernels' calls.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <memory>
#include <vector>

#include "ops/attention.h"

namespace detour::ops {

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

/// Gradients of attention: dq [R, H·K], dk and dv [W, G·K], zero at first.
struct AttentionGradients {
  const at::Tensor &q, &k, &v, &out, &lse, &dout;
  int64_t num_kv_heads;
  at::Tensor dq = at::zeros_like(q), dk = at::zeros_like(k), dv = at::zeros_like(v);

  /// kernels::AttendBackward.
  void Add(const std::vector<kernels::AttendGradSegment>& segments);
};

/// Sum over each kv head's query heads: [rows, H·K] -> [rows, G·K].
at::Tensor SumGroups(const at::Tensor& x, int64_t num_kv_heads, int64_t head_dim);

/// Attention in which every row queries and writes: `run` fills out [N, H·K] and, if it is defined,
/// lse [N, H], and returns what fills the gradients.
using BackwardFn = std::function<void(AttentionGradients& gradients)>;
using RunFn = std::function<BackwardFn(at::Tensor& out, const at::Tensor& lse)>;
at::Tensor MixRows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const AttendShape& shape, const RunFn& run);

}  // namespace detour::ops
