#include "ops/attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "core/error.h"
#include "ops/attend.h"
#include "ops/linear.h"

namespace detour::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

/// Runs of consecutive querying rows within written rows [begin, end): calls run(first query,
/// first written row, length).
template <class Run>
void ForEachRun(const at::Tensor& rows_R, const RoutedSegment& s, const Run& run) {
  const int32_t* rows = I32(rows_R);
  const int64_t last = std::lower_bound(rows, rows + rows_R.size(0), s.end) - rows;
  for (int64_t r = std::lower_bound(rows, rows + last, s.begin) - rows; r < last;) {
    int64_t n = 1;
    while (r + n < last && rows[r + n] == rows[r] + n) ++n;
    run(r, rows[r], n);
    r += n;
  }
}

/// Attention of the querying rows; out [R, H·K] and, if `lse` is defined, log-sum-exp [R, H].
void AttendRows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v_W,
                const MixArgs& args, at::Tensor& out, const at::Tensor& lse) {
  CallPages call(args.shape.layout);
  std::vector<kernels::AttendSegment> segments;
  for (const RoutedSegment& s : args.shape.segments) {
    const auto [pages, first_entry] =
        WriteSegment(args.shape, s, k, v_W, args.shape.store ? *args.shape.store : call);
    if (q.size(0) == k.size(0)) {
      segments.push_back({pages, s.begin, s.end - s.begin, first_entry + 1});
      continue;
    }
    ForEachRun(args.rows_R, s, [&](int64_t query, int64_t written, int64_t length) {
      segments.push_back({pages, query, length, first_entry + written - s.begin + 1});
    });
  }
  RunAttend(args.shape, q, segments, out, lse);
}

/// What the queries saw of the rows [begin, end), which wrote: each the entries up to its own.
void AddGradients(const at::Tensor& rows_R, int64_t begin, int64_t end, AttentionGradients& g) {
  kernels::AttendGradSegment segment{.row_begin = begin,
                                     .num_rows = end - begin,
                                     .num_entries = end - begin,
                                     .first_entry = begin,
                                     .first_limit = 1};
  if (g.q.size(0) == g.k.size(0)) return g.Add({segment});
  const int32_t* rows = I32(rows_R);
  const int32_t* const first = std::lower_bound(rows, rows + rows_R.size(0), begin);
  const int32_t* const last = std::lower_bound(first, rows + rows_R.size(0), end);
  std::vector<kernels::RowView> views;
  for (const int32_t* row = first; row < last; ++row) views.push_back({0, 0, *row - begin + 1});
  segment.row_begin = first - rows;
  segment.num_rows = std::ssize(views);
  segment.views = views.data();
  g.Add({segment});
}

struct MixFn : torch::autograd::Function<MixFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const MixArgs& args, bool needs_backward) {
    const kernels::KvLayout& layout = args.shape.layout;
    const int64_t num_rows = v.size(0), num_queries = q.size(0), width = q.size(1);
    const bool join = args.bypass_rows.defined();  // the answer has all rows
    at::Tensor out = at::empty({num_queries, width}, q.options()), y = out, v_W = v;
    if (join) {
      v_W = v.index_select(0, args.rows_R);
      y = at::empty({num_rows, width}, q.options());
    }
    at::Tensor lse;
    if (needs_backward) lse = at::empty({num_queries, args.shape.num_heads}, q.options());
    if (k.size(0) > 0) AttendRows(q, k, v_W, args, out, lse);
    if (join) {
      kernels::ScatterRows(F32(out), width, I32(args.rows_R), num_queries, width, F32(y), width);
      kernels::RepeatKvRows(F32(v), v.size(1), I32(args.bypass_rows), num_rows - num_queries,
                            layout.num_kv_heads, args.shape.num_heads, layout.head_dim, F32(y),
                            width);
    }
    if (needs_backward) {
      DETOUR_CHECK(!args.shape.store, "gradients through a cache");
      ctx->save_for_backward({q, k, v_W, out, lse, args.rows_R, args.bypass_rows});
      std::vector<int64_t> bounds;
      for (const RoutedSegment& s : args.shape.segments) {
        bounds.push_back(s.begin);
        bounds.push_back(s.end);
      }
      ctx->saved_data["bounds"] = bounds;
      ctx->saved_data["heads"] = std::vector<int64_t>{layout.num_kv_heads, num_rows};
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v_W = saved[2], &rows = saved[5],
                     &bypass_rows = saved[6];
    const auto heads = ctx->saved_data["heads"].toIntVector();
    const auto bounds = ctx->saved_data["bounds"].toIntVector();
    const int64_t num_kv_heads = heads[0], num_rows = heads[1];
    const at::Tensor dy = grads[0].contiguous();
    const bool join = bypass_rows.defined();
    const at::Tensor dout = join ? dy.index_select(0, rows) : dy;
    AttentionGradients g{q, k, v_W, saved[3], saved[4], dout, num_kv_heads};
    for (size_t i = 0; i < bounds.size(); i += 2) AddGradients(rows, bounds[i], bounds[i + 1], g);
    at::Tensor dv = g.dv;
    if (join) {
      dv = at::empty({num_rows, v_W.size(1)}, dy.options());
      const at::Tensor dv_U =
          SumGroups(dy.index_select(0, bypass_rows), num_kv_heads, v_W.size(1) / num_kv_heads)
              .contiguous();
      kernels::ScatterRows(F32(g.dv), dv.size(1), I32(rows), rows.size(0), dv.size(1), F32(dv),
                           dv.size(1));
      kernels::ScatterRows(F32(dv_U), dv.size(1), I32(bypass_rows), bypass_rows.size(0), dv.size(1),
                           F32(dv), dv.size(1));
    }
    return {g.dq, g.dk, dv, at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor Mix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const MixArgs& args) {
  const bool needs_backward =
      at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  return MixFn::apply(q, k, v, args, needs_backward);
}

at::Tensor AttendPrefix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const std::vector<Prefix>& prefixes, int64_t num_heads,
                        int64_t num_kv_heads, int64_t head_dim) {
  const at::NoGradGuard no_grad;
  AttendShape shape{num_heads, {num_kv_heads, head_dim}, at::zeros({k.size(0)}, at::kInt)};
  at::Tensor out = at::zeros_like(q);
  CallPages pages(shape.layout);
  std::vector<kernels::RowView> views(prefixes.size());
  std::vector<kernels::AttendSegment> segments;
  const auto count = std::ssize(prefixes);
  for (int64_t u = 0; u < count;) {
    const int64_t begin = prefixes[u].begin;
    while (u < count && prefixes[u].begin == begin && prefixes[u].end == begin) ++u;
    const int64_t first = u;
    for (; u < count && prefixes[u].begin == begin; ++u) views[u].end = prefixes[u].end - begin;
    if (u == first) continue;
    const auto table = WriteSegment(shape, {begin, prefixes[u - 1].end, 0}, k, v, pages).pages;
    segments.push_back({table, first, u - first, 0, &views[first]});
  }
  RunAttend(shape, q, segments, out, {});
  return out;
}

at::Tensor RepeatKv(const at::Tensor& v, int64_t num_kv_heads, int64_t num_heads) {
  return v.view({v.size(0), num_kv_heads, 1, -1})
      .expand({-1, -1, num_heads / num_kv_heads, -1})
      .reshape({v.size(0), -1});
}

at::Tensor ScaleHeads(const at::Tensor& heads, const at::Tensor& weight_H) {
  return (heads.view({heads.size(0), weight_H.size(0), -1}) * weight_H.unsqueeze(1))
      .view({heads.size(0), -1});
}

}  // namespace detour::ops
