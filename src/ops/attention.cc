#include "ops/attention.h"

#include <ATen/ATen.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
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
                         F32(k) + s.begin * k.size(1), k.size(1), F32(v_W) + s.begin * v_W.size(1),
                         v_W.size(1), I32(args.positions_W) + s.begin);
    if (q.size(0) == k.size(0)) {
      segments.push_back({pages.pages, s.begin, n, pages.first_entry + 1});
      continue;
    }
    ForEachRun(args.rows_R, s, [&](int64_t query, int64_t written, int64_t length) {
      segments.push_back({pages.pages, query, length, pages.first_entry + written - s.begin + 1});
    });
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

/// Gradients of one segment's attention, written into dq [R, H·K] and added to dk, dv [W, G·K].
struct SegmentGradients {
  const at::Tensor &q, &k, &v, &out, &lse, &dout;
  int64_t num_kv_heads, head_dim;
  at::Tensor dq, dk, dv;

  /// Queries [b, e) are the written rows [b, e): libtorch's flash backward.
  void Square(int64_t b, int64_t e) {
    const int64_t repeat = q.size(1) / k.size(1);
    const auto heads = [&](const at::Tensor& t) { return Heads(t.slice(0, b, e), head_dim); };
    auto [dq_h, dk_h, dv_h] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        heads(dout), heads(q), RepeatHeads(heads(k), repeat), RepeatHeads(heads(v), repeat),
        heads(out), lse.slice(0, b, e).t().unsqueeze(0), /*dropout_p=*/0.0, /*is_causal=*/true);
    const auto rows_of = [&](const at::Tensor& t) {
      return t.transpose(1, 2).reshape({e - b, -1});
    };
    dq.slice(0, b, e).copy_(rows_of(dq_h));
    dk.slice(0, b, e).copy_(SumGroups(rows_of(dk_h), num_kv_heads, head_dim));
    dv.slice(0, b, e).copy_(SumGroups(rows_of(dv_h), num_kv_heads, head_dim));
  }

  /// Queries [first, last) at written rows `rows`, of a segment that begins at `begin`: blocks of
  /// queries against the entries up to their last.
  void Blocks(int64_t first, int64_t last, const int32_t* rows, int64_t begin) {
    constexpr int64_t kBlock = 128;
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    for (int64_t b = first; b < last; b += kBlock) {
      const int64_t e = std::min(b + kBlock, last), m = e - b, end = rows[e - 1] + 1;
      // [rows, heads·K] -> [G, heads/G · rows, K], and back.
      const auto queries = [&](const at::Tensor& t) {
        return t.slice(0, b, e)
            .view({m, num_kv_heads, -1, head_dim})
            .permute({1, 2, 0, 3})
            .reshape({num_kv_heads, -1, head_dim});
      };
      const auto entries = [&](const at::Tensor& t) {
        return t.slice(0, begin, end).view({end - begin, num_kv_heads, head_dim}).transpose(0, 1);
      };
      const at::Tensor q_b = queries(q), do_b = queries(dout), k_b = entries(k), v_b = entries(v);
      const at::Tensor lse_b = lse.slice(0, b, e)
                                   .view({m, num_kv_heads, -1})
                                   .permute({1, 2, 0})
                                   .reshape({num_kv_heads, -1, 1});
      at::Tensor p = at::bmm(q_b, k_b.transpose(1, 2)).mul_(scale).sub_(lse_b).exp_();
      const at::Tensor limit = at::tensor(at::ArrayRef<int32_t>(rows + b, m)) - begin;
      const at::Tensor seen =
          at::arange(end - begin, at::kInt).unsqueeze(0).le(limit.unsqueeze(1));  // [m, entries]
      p.view({num_kv_heads, -1, m, end - begin}).mul_(seen);
      const at::Tensor delta = (do_b * queries(out)).sum(-1, true);
      const at::Tensor ds = at::bmm(do_b, v_b.transpose(1, 2)).sub_(delta).mul_(p).mul_(scale);
      dq.slice(0, b, e).copy_(at::bmm(ds, k_b)
                                  .view({num_kv_heads, -1, m, head_dim})
                                  .permute({2, 0, 1, 3})
                                  .reshape({m, -1}));
      const auto add = [&](at::Tensor& to, const at::Tensor& t) {
        to.slice(0, begin, end).add_(t.transpose(0, 1).reshape({end - begin, -1}));
      };
      add(dk, at::bmm(ds.transpose(1, 2), q_b));
      add(dv, at::bmm(p.transpose(1, 2), do_b));
    }
  }
};

struct MixFn : torch::autograd::Function<MixFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const MixArgs& args, bool needs_backward) {
    const int64_t num_rows = v.size(0), num_queries = q.size(0), width = q.size(1);
    const bool join = args.bypass_rows.defined();  // the answer has all rows
    at::Tensor out = at::empty({num_queries, width}, q.options()), y = out, v_W = v;
    if (join) {
      v_W = v.index_select(0, args.rows_R);
      y = at::empty({num_rows, width}, q.options());
    }
    at::Tensor lse;
    if (needs_backward) lse = at::empty({num_queries, args.num_heads}, q.options());
    if (k.size(0) > 0) AttendRows(q, k, v_W, args, out, lse);
    if (join) {
      kernels::ScatterRows(F32(out), width, I32(args.rows_R), num_queries, width, F32(y), width);
      kernels::RepeatKvRows(F32(v), v.size(1), I32(args.bypass_rows), num_rows - num_queries,
                            args.num_kv_heads, args.num_heads, args.head_dim, F32(y), width);
    }
    if (needs_backward) {
      DETOUR_CHECK(!args.store, "gradients through a cache");
      ctx->save_for_backward({q, k, v_W, out, lse, args.rows_R, args.bypass_rows});
      std::vector<int64_t> bounds;
      for (const RoutedSegment& s : args.segments) {
        bounds.push_back(s.begin);
        bounds.push_back(s.end);
      }
      ctx->saved_data["bounds"] = bounds;
      ctx->saved_data["heads"] = std::vector<int64_t>{args.num_kv_heads, args.head_dim, num_rows};
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v_W = saved[2], &rows = saved[5],
                     &bypass_rows = saved[6];
    const auto heads = ctx->saved_data["heads"].toIntVector();
    const auto bounds = ctx->saved_data["bounds"].toIntVector();
    const int64_t num_kv_heads = heads[0], head_dim = heads[1], num_rows = heads[2];
    const at::Tensor dy = grads[0].contiguous();
    const bool join = bypass_rows.defined(), square = q.size(0) == k.size(0);
    const at::Tensor dout = join ? dy.index_select(0, rows) : dy;
    const auto zeros = [&](const at::Tensor& t) {
      return square ? at::empty_like(t) : at::zeros_like(t);
    };
    SegmentGradients g{q,        k,        v_W,      saved[3],  saved[4], dout, num_kv_heads,
                       head_dim, zeros(q), zeros(k), zeros(v_W)};
    for (size_t i = 0; i < bounds.size(); i += 2) {
      const int64_t b = bounds[i], e = bounds[i + 1];
      if (square) {
        g.Square(b, e);
        continue;
      }
      const int32_t* row = I32(rows);
      const int32_t* const end = row + rows.size(0);
      g.Blocks(std::lower_bound(row, end, b) - row, std::lower_bound(row, end, e) - row, row, b);
    }
    at::Tensor dv = g.dv;
    if (join) {
      dv = at::empty({num_rows, v_W.size(1)}, dy.options());
      const at::Tensor dv_U =
          SumGroups(dy.index_select(0, bypass_rows), num_kv_heads, head_dim).contiguous();
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
  MixArgs args{.positions_W = at::zeros({k.size(0)}, at::kInt),
               .num_heads = num_heads,
               .num_kv_heads = num_kv_heads,
               .head_dim = head_dim};
  for (const Prefix& p : prefixes) {
    // Queries of one document have one begin, and ends that do not fall.
    if (args.segments.empty() || args.segments.back().begin != p.begin) {
      args.segments.push_back({p.begin, p.end, 0});
    }
    args.segments.back().end = std::max(args.segments.back().end, p.end);
  }
  const TemporaryPages pages(args, q.options());
  at::Tensor out = at::zeros_like(q);
  std::vector<kernels::AttendSegment> segments;
  size_t query = 0;
  for (size_t i = 0; i < args.segments.size(); ++i) {
    const RoutedSegment& s = args.segments[i];
    float* const* table = pages.table.data() + pages.first_page[i];
    kernels::WriteKvRows(LayoutOf(args), table, 0, s.end - s.begin, F32(k) + s.begin * k.size(1),
                         k.size(1), F32(v) + s.begin * v.size(1), v.size(1),
                         I32(args.positions_W) + s.begin);
    for (; query < prefixes.size() && prefixes[query].begin == s.begin; ++query) {
      const Prefix& p = prefixes[query];
      if (p.end > p.begin) {
        segments.push_back({table, static_cast<int64_t>(query), 1, p.end - p.begin});
      }
    }
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  kernels::Attend(LayoutOf(args), num_heads, scale, F32(q), q.size(1), segments, F32(out),
                  out.size(1), nullptr);
  return out;
}

at::Tensor RepeatKv(const at::Tensor& v, int64_t num_kv_heads, int64_t num_heads) {
  return v.view({v.size(0), num_kv_heads, 1, -1})
      .expand({-1, -1, num_heads / num_kv_heads, -1})
      .reshape({v.size(0), -1});
}

}  // namespace detour::ops
