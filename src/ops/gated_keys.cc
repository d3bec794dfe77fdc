#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "ops/attend.h"
#include "ops/linear.h"

namespace detour::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

constexpr int64_t kBlockQueries = 128;

/// [rows, heads·K] -> [G, heads/G · rows, K] of rows [b, e).
at::Tensor QueryHeads(const at::Tensor& t, int64_t b, int64_t e, int64_t num_kv_heads,
                      int64_t head_dim) {
  return t.slice(0, b, e)
      .view({e - b, num_kv_heads, -1, head_dim})
      .permute({1, 2, 0, 3})
      .reshape({num_kv_heads, -1, head_dim});
}

/// [rows, G·K] -> [G, rows, K].
at::Tensor EntryHeads(const at::Tensor& t, int64_t begin, int64_t end, int64_t num_kv_heads) {
  return t.slice(0, begin, end).view({end - begin, num_kv_heads, -1}).transpose(0, 1);
}

/// What is needed to weigh keys against a block of queries.
struct KeyWeights {
  const at::Tensor &q, &out, &dout, &k, &v, &written_N;
  int64_t num_kv_heads, head_dim;

  /// What the key weight of each row [begin, end) changes for queries [b, e) of the document.
  at::Tensor Gradient(int64_t b, int64_t e, const int32_t* rows, int64_t begin, int64_t end) const {
    const int64_t m = e - b, n = end - begin;
    const auto queries = [&](const at::Tensor& t) {
      return QueryHeads(t, b, e, num_kv_heads, head_dim);
    };
    const auto entries = [&](const at::Tensor& t) {
      return EntryHeads(t, begin, end, num_kv_heads).transpose(1, 2);
    };
    const double scale = 1 / std::sqrt(static_cast<float>(head_dim));
    const at::Tensor row = at::tensor(at::ArrayRef<int32_t>(rows + b, m)).unsqueeze(1) - begin;
    const at::Tensor entry = at::arange(n, at::kInt).unsqueeze(0);
    at::Tensor s = at::bmm(queries(q), entries(k)).mul_(scale).view({num_kv_heads, -1, m, n});
    s.masked_fill_(entry.gt(row), -INFINITY);
    const at::Tensor seen = s.masked_fill(written_N.slice(0, begin, end).eq(0), -INFINITY);
    const at::Tensor p = (s - seen.logsumexp(-1, true)).exp_().masked_fill_(entry.eq(row), 0);
    const at::Tensor do_b = queries(dout);
    const at::Tensor delta = (do_b * queries(out)).sum(-1, true);
    const at::Tensor change = at::bmm(do_b, entries(v)).sub_(delta);
    return (p * change.view_as(p)).sum(at::IntArrayRef{0, 1, 2});
  }
};

struct CountKeysFn : torch::autograd::Function<CountKeysFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& out, const at::Tensor& q,
                            const at::Tensor& k, const at::Tensor& v, const at::Tensor& gate_N,
                            const at::Tensor& rows, const std::vector<int64_t>& bounds,
                            int64_t num_kv_heads, int64_t head_dim) {
    ctx->save_for_backward({out, q, k, v, gate_N, rows});
    ctx->saved_data["bounds"] = bounds;
    ctx->saved_data["num_kv_heads"] = num_kv_heads;
    ctx->saved_data["head_dim"] = head_dim;
    return out.clone();
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &gate_N = saved[4], &rows = saved[5];
    const at::Tensor dout = grads[0].contiguous();
    const KeyWeights weights{saved[1],
                             saved[0],
                             dout,
                             saved[2],
                             saved[3],
                             gate_N,
                             ctx->saved_data["num_kv_heads"].toInt(),
                             ctx->saved_data["head_dim"].toInt()};
    const auto bounds = ctx->saved_data["bounds"].toIntVector();
    const int32_t* row = I32(rows);
    const int32_t* const last = row + rows.size(0);
    at::Tensor dgate = at::zeros_like(gate_N);
    for (size_t i = 0; i < bounds.size(); i += 2) {
      const int64_t first = std::lower_bound(row, last, bounds[i]) - row;
      const int64_t end = std::lower_bound(row, last, bounds[i + 1]) - row;
      for (int64_t b = first; b < end; b += kBlockQueries) {
        const int64_t e = std::min(b + kBlockQueries, end), seen = row[e - 1] + 1;
        dgate.slice(0, bounds[i], seen).add_(weights.Gradient(b, e, row, bounds[i], seen));
      }
    }
    return {grads[0],     at::Tensor(), at::Tensor(), at::Tensor(), dgate,
            at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor CountKeys(const at::Tensor& out, const at::Tensor& q, const GatedKeys& keys,
                     int64_t num_kv_heads, int64_t head_dim) {
  std::vector<int64_t> bounds;
  for (const RoutedSegment& s : keys.segments) {
    bounds.push_back(s.begin);
    bounds.push_back(s.end);
  }
  return CountKeysFn::apply(out, q.detach(), keys.k, keys.v, keys.gate_N, keys.rows_R, bounds,
                            num_kv_heads, head_dim);
}

}  // namespace detour::ops
