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

at::Tensor QueryHeads(const at::Tensor& t, int64_t b, int64_t e, int64_t num_kv_heads,
                      int64_t head_dim) {
  return t.slice(0, b, e)
      .view({e - b, num_kv_heads, -1, head_dim})
      .permute({1, 2, 0, 3})
      .reshape({num_kv_heads, -1, head_dim});
}

at::Tensor EntryHeads(const at::Tensor& t, int64_t begin, int64_t end, int64_t num_kv_heads) {
  return t.slice(0, begin, end).view({end - begin, num_kv_heads, -1}).transpose(0, 1);
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

void AttentionGradients::Masked(int64_t b, int64_t e, int64_t begin, const at::Tensor& seen) {
  const int64_t m = e - b, n = e - begin, head_dim = k.size(1) / num_kv_heads;
  const double scale = 1 / std::sqrt(static_cast<float>(head_dim));
  const auto queries = [&](const at::Tensor& t) {
    return QueryHeads(t, b, e, num_kv_heads, head_dim);
  };
  const at::Tensor k_b = EntryHeads(k, begin, e, num_kv_heads);
  const at::Tensor v_b = EntryHeads(v, begin, e, num_kv_heads);
  const at::Tensor q_b = queries(q), do_b = queries(dout);
  const at::Tensor lse_b = QueryHeads(lse, b, e, num_kv_heads, 1);
  at::Tensor p = at::bmm(q_b, k_b.transpose(1, 2)).mul_(scale).sub_(lse_b);
  // What a query does not see may exceed its maximum by far.
  p.view({num_kv_heads, -1, m, n}).masked_fill_(seen.logical_not(), -INFINITY);
  p.exp_();
  const at::Tensor delta = (do_b * queries(out)).sum(-1, true);
  const at::Tensor ds = at::bmm(do_b, v_b.transpose(1, 2)).sub_(delta).mul_(p).mul_(scale);
  dq.slice(0, b, e).copy_(at::bmm(ds, k_b)
                              .view({num_kv_heads, -1, m, head_dim})
                              .permute({2, 0, 1, 3})
                              .reshape({m, -1}));
  const auto add = [&](at::Tensor& to, const at::Tensor& t) {
    to.slice(0, begin, e).add_(t.transpose(0, 1).reshape({n, -1}));
  };
  add(dk, at::bmm(ds.transpose(1, 2), q_b));
  add(dv, at::bmm(p.transpose(1, 2), do_b));
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
