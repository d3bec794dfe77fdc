#include "ops/attention.h"

#include <ATen/ATen.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <memory>

#include "core/error.h"
#include "ops/linear.h"

namespace detour::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

kernels::KvLayout LayoutOf(const MixArgs& args) {
  return {args.num_kv_heads, args.head_dim, args.with_positions};
}

/// Pages for one call: what training and full forward passes without a cache attend to.
struct TemporaryPages {
  at::Tensor buffer;
  std::vector<float*> table;
  std::vector<int64_t> first_page;  // of each segment

  TemporaryPages(const MixArgs& args, const at::TensorOptions& options) {
    int64_t num_pages = 0;
    for (const RoutedSegment& s : args.segments) {
      first_page.push_back(num_pages);
      num_pages += (s.end - s.begin + kernels::kPageEntries - 1) / kernels::kPageEntries;
    }
    const int64_t floats = LayoutOf(args).PageBytes() / 4;
    buffer = at::empty({num_pages * floats}, options);
    for (int64_t p = 0; p < num_pages; ++p) table.push_back(F32(buffer) + p * floats);
  }
};

/// Attention of the routed rows; out [R, H·K] and, if `lse` is defined, log-sum-exp [R, H].
void AttendRouted(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v_R,
                  const MixArgs& args, at::Tensor& out, const at::Tensor& lse) {
  std::unique_ptr<TemporaryPages> temporary;
  if (!args.store) temporary = std::make_unique<TemporaryPages>(args, q.options());
  std::vector<kernels::AttendSegment> segments;
  for (size_t i = 0; i < args.segments.size(); ++i) {
    const RoutedSegment& s = args.segments[i];
    const int64_t n = s.end - s.begin;
    const KvStore::Pages pages =
        args.store ? args.store->Extend(s.sequence, n)
                   : KvStore::Pages{temporary->table.data() + temporary->first_page[i], 0};
    kernels::WriteKvRows(LayoutOf(args), pages.pages, pages.first_entry, n,
                         F32(k) + s.begin * k.size(1), k.size(1), F32(v_R) + s.begin * v_R.size(1),
                         v_R.size(1), I32(args.positions_R) + s.begin);
    segments.push_back({pages.pages, s.begin, n, pages.first_entry + 1});
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(args.head_dim));
  kernels::Attend(LayoutOf(args), args.num_heads, scale, F32(q), q.size(1), segments, F32(out),
                  out.size(1), lse.defined() ? F32(lse) : nullptr);
}

/// [rows, heads·K] -> [1, heads, rows, K], a view.
at::Tensor Heads(const at::Tensor& x, int64_t head_dim) {
  return x.view({1, x.size(0), x.size(1) / head_dim, head_dim}).transpose(1, 2);
}

/// [1, G, rows, K] -> [1, G·repeat, rows, K].
at::Tensor RepeatHeads(const at::Tensor& x, int64_t repeat) {
  return repeat == 1 ? x : x.repeat_interleave(repeat, 1);
}

/// Sum over each kv head's query heads: [.., rows, H·K] -> [rows, G·K] for row-major rows.
at::Tensor SumGroups(const at::Tensor& x, int64_t num_kv_heads, int64_t head_dim) {
  const int64_t group = x.size(1) / (num_kv_heads * head_dim);
  if (group == 1) return x;
  return x.view({x.size(0), num_kv_heads, group, head_dim})
      .sum(2)
      .view({x.size(0), num_kv_heads * head_dim});
}

struct MixFn : torch::autograd::Function<MixFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const MixArgs& args, bool needs_backward) {
    const int64_t num_rows = v.size(0), num_routed = q.size(0), width = q.size(1);
    const bool all_routed = num_routed == num_rows;
    at::Tensor y = at::empty({num_rows, width}, q.options());
    at::Tensor v_R = v, out = y;
    if (!all_routed) {
      v_R = v.index_select(0, args.rows_R);
      out = at::empty({num_routed, width}, q.options());
    }
    at::Tensor lse;
    if (needs_backward) lse = at::empty({num_routed, args.num_heads}, q.options());
    if (num_routed > 0) AttendRouted(q, k, v_R, args, out, lse);
    if (!all_routed) {
      kernels::ScatterRows(F32(out), width, I32(args.rows_R), num_routed, width, F32(y), width);
      kernels::RepeatKvRows(F32(v), v.size(1), I32(args.bypass_rows), num_rows - num_routed,
                            args.num_kv_heads, args.num_heads, args.head_dim, F32(y), width);
    }
    if (needs_backward) {
      DETOUR_CHECK(!args.store, "gradients through a cache");
      ctx->save_for_backward({q, k, v_R, out, lse, args.rows_R, args.bypass_rows});
      std::vector<int64_t> bounds;
      for (const RoutedSegment& s : args.segments) {
        bounds.push_back(s.begin);
        bounds.push_back(s.end);
      }
      ctx->saved_data["bounds"] = bounds;
      ctx->saved_data["heads"] =
          std::vector<int64_t>{args.num_heads, args.num_kv_heads, args.head_dim, num_rows};
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v_R = saved[2], &out = saved[3],
                     &lse = saved[4], &rows = saved[5], &bypass_rows = saved[6];
    const auto heads = ctx->saved_data["heads"].toIntVector();
    const auto bounds = ctx->saved_data["bounds"].toIntVector();
    const int64_t num_kv_heads = heads[1], head_dim = heads[2], num_rows = heads[3];
    const int64_t repeat = heads[0] / num_kv_heads;
    const at::Tensor dy = grads[0].contiguous();
    const bool all_routed = q.size(0) == num_rows;
    const at::Tensor dy_R = all_routed ? dy : dy.index_select(0, rows);

    at::Tensor dq = at::empty_like(q), dk = at::empty_like(k), dv_R = at::empty_like(v_R);
    for (size_t i = 0; i < bounds.size(); i += 2) {
      const int64_t b = bounds[i], e = bounds[i + 1];
      const auto slice = [&](const at::Tensor& t) { return t.slice(0, b, e); };
      auto [dq_h, dk_h, dv_h] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          Heads(slice(dy_R), head_dim), Heads(slice(q), head_dim),
          RepeatHeads(Heads(slice(k), head_dim), repeat),
          RepeatHeads(Heads(slice(v_R), head_dim), repeat), Heads(slice(out), head_dim),
          slice(lse).t().unsqueeze(0), /*dropout_p=*/0.0, /*is_causal=*/true);
      const auto rows_of = [&](const at::Tensor& t) {
        return t.transpose(1, 2).reshape({e - b, -1});
      };
      slice(dq).copy_(rows_of(dq_h));
      slice(dk).copy_(SumGroups(rows_of(dk_h), num_kv_heads, head_dim));
      slice(dv_R).copy_(SumGroups(rows_of(dv_h), num_kv_heads, head_dim));
    }
    at::Tensor dv = dv_R;
    if (!all_routed) {
      dv = at::empty({num_rows, v_R.size(1)}, dy.options());
      const at::Tensor dv_B =
          SumGroups(dy.index_select(0, bypass_rows), num_kv_heads, head_dim).contiguous();
      kernels::ScatterRows(F32(dv_R), dv.size(1), I32(rows), rows.size(0), dv.size(1), F32(dv),
                           dv.size(1));
      kernels::ScatterRows(F32(dv_B), dv.size(1), I32(bypass_rows), bypass_rows.size(0), dv.size(1),
                           F32(dv), dv.size(1));
    }
    return {dq, dk, dv, at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor Mix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const MixArgs& args) {
  const bool needs_backward =
      at::GradMode::is_enabled() && (q.requires_grad() || v.requires_grad());
  return MixFn::apply(q, k, v, args, needs_backward);
}

}  // namespace detour::ops
