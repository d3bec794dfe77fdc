#include "ops/attend.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "ops/linear.h"

namespace detour::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

KvStore::Pages CallPages::Extend(int32_t, int64_t num_entries) {
  const int64_t floats = layout_.PageBytes() / 4;
  const int64_t pages = (num_entries + kernels::kPageEntries - 1) / kernels::kPageEntries;
  buffers_.push_back(at::empty({pages * floats}, at::kFloat));
  tables_.push_back(std::make_unique<std::vector<float*>>(pages));
  for (int64_t p = 0; p < pages; ++p) (*tables_.back())[p] = F32(buffers_.back()) + p * floats;
  return {tables_.back()->data(), 0};
}

KvStore::Pages WriteSegment(const AttendShape& shape, const RoutedSegment& s, const at::Tensor& k,
                            const at::Tensor& v, KvStore& store) {
  const int64_t n = s.end - s.begin;
  const KvStore::Pages pages = store.Extend(s.sequence, n);
  kernels::WriteKvRows(shape.layout, pages.pages, pages.first_entry, n,
                       F32(k) + s.begin * k.size(1), k.size(1), F32(v) + s.begin * v.size(1),
                       v.size(1), I32(shape.positions_W) + s.begin);
  return pages;
}

void RunAttend(const AttendShape& shape, const at::Tensor& q,
               const std::vector<kernels::AttendSegment>& segments, at::Tensor& out,
               const at::Tensor& lse) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.layout.head_dim));
  kernels::Attend(shape.layout, shape.num_heads, scale, F32(q), q.size(1), segments, F32(out),
                  out.size(1), lse.defined() ? F32(lse) : nullptr);
}

at::Tensor SumGroups(const at::Tensor& x, int64_t num_kv_heads, int64_t head_dim) {
  const int64_t group = x.size(1) / (num_kv_heads * head_dim);
  if (group == 1) return x;
  return x.view({x.size(0), num_kv_heads, group, head_dim})
      .sum(2)
      .view({x.size(0), num_kv_heads * head_dim});
}

void AttentionGradients::Add(const std::vector<kernels::AttendGradSegment>& segments) {
  const int64_t head_dim = k.size(1) / num_kv_heads, num_heads = q.size(1) / head_dim;
  kernels::AttendBackward({.num_heads = num_heads,
                           .num_kv_heads = num_kv_heads,
                           .head_dim = head_dim,
                           .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
                           .q = F32(q),
                           .k = F32(k),
                           .v = F32(v),
                           .out = F32(out),
                           .lse_RH = F32(lse),
                           .dout = F32(dout),
                           .dq = F32(dq),
                           .dk = F32(dk),
                           .dv = F32(dv)},
                          segments);
}

namespace {

struct BackwardCapsule : torch::CustomClassHolder {
  BackwardFn fill;
};

struct MixRowsFn : torch::autograd::Function<MixRowsFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const AttendShape& shape, const RunFn& run,
                            bool needs_backward) {
    at::Tensor out = at::empty_like(q), lse;
    if (needs_backward) lse = at::empty({q.size(0), shape.num_heads}, q.options());
    auto capsule = c10::make_intrusive<BackwardCapsule>();
    capsule->fill = run(out, lse);
    if (!needs_backward) return out;
    DETOUR_CHECK(!shape.store, "gradients through a cache");
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["fill"] = c10::IValue::make_capsule(std::move(capsule));
    ctx->saved_data["kv_heads"] = shape.layout.num_kv_heads;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor dout = grads[0].contiguous();
    AttentionGradients g{saved[0],
                         saved[1],
                         saved[2],
                         saved[3],
                         saved[4],
                         dout,
                         ctx->saved_data["kv_heads"].toInt()};
    const auto capsule = ctx->saved_data["fill"].toCapsule();
    static_cast<BackwardCapsule*>(capsule.get())->fill(g);
    return {g.dq, g.dk, g.dv, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor MixRows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const AttendShape& shape, const RunFn& run) {
  const bool needs_backward =
      at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  return MixRowsFn::apply(q, k, v, shape, run, needs_backward);
}

}  // namespace detour::ops
