// Attention of one layer: which rows query, which keys they see, what the others get.
#include <ATen/ATen.h>

#include <cmath>
#include <optional>

#include "model/counterfactual.h"
#include "model/model.h"
#include "ops/attention.h"
#include "ops/rows.h"

namespace detour::model {

using routing::Bypass;
using routing::Plan;
using routing::Stream;

namespace {

/// W_O of the attention of the plan's rows among the entries of their documents. Keys are those
/// rows' own, or with write_all every row's. With the value bypass the other rows get W_O of their
/// own value, weighed and with a constant as the plan says, and the answer has all rows, else the
/// plan's rows.
at::Tensor Attention(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                     const Stream& stream, const Plan& plan, ops::KvStore* store,
                     const ops::GatedKeys* gated) {
  const ModelConfig& c = model.config;
  const bool all_write = plan.all_routed || plan.write_all, value = plan.bypass == Bypass::kValue;
  const at::Tensor h_ND =
      ops::RmsNorm(all_write || value ? x_ND : ops::GatherRows(x_ND, plan.rows_R), layer.input_norm,
                   c.rms_norm_eps);
  const at::Tensor h_RD =
      plan.all_routed || !(all_write || value) ? h_ND : ops::GatherRows(h_ND, plan.rows_R);
  const at::Tensor positions_R = RoutedPositions(stream, plan);
  const ops::AttendShape shape{c.num_heads, layer.kv_layout,
                               all_write ? stream.positions_N : positions_R,
                               RoutedSegments(stream, all_write ? Plan{} : plan), store};
  const ops::MixArgs args{.shape = shape,
                          .rows_R = plan.rows_R,
                          .bypass_rows = value ? plan.bypass_rows : at::Tensor()};
  const at::Tensor q = RotatedHeads(model, layer, h_RD, layer.q, layer.q_norm, positions_R, stream);
  const at::Tensor k = RotatedHeads(model, layer, all_write ? h_ND : h_RD, layer.k, layer.k_norm,
                                    shape.positions_W, stream);
  at::Tensor y = ops::Mix(q, k, ops::Linear(h_ND, layer.v), args);
  if (gated) {
    const bool join = args.bypass_rows.defined();
    const at::Tensor y_RW = join ? ops::GatherRows(y, plan.rows_R) : y;
    const at::Tensor counted = ops::CountKeys(y_RW, q, *gated, c.num_kv_heads, c.head_dim);
    y = join ? ops::ReplaceRows(y, plan.rows_R, counted) : counted;
  }
  if (plan.bypass_H.defined() && args.bypass_rows.defined()) {
    const at::Tensor values = ops::GatherRows(y, plan.bypass_rows);
    y = ops::ReplaceRows(y, plan.bypass_rows, ops::ScaleHeads(values, plan.bypass_H));
  }
  y = ops::Linear(y, layer.o);
  if (plan.bypass_D.defined() && args.bypass_rows.defined()) {
    const at::Tensor rows = ops::GatherRows(y, plan.bypass_rows) + plan.bypass_D;
    y = ops::ReplaceRows(y, plan.bypass_rows, rows);
  }
  return y;
}

/// Queries, keys and values of every row.
struct Heads {
  at::Tensor q, k, v;
  ops::AttendShape shape;

  Heads(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND, const Stream& stream,
        ops::KvStore* store) {
    const ModelConfig& c = model.config;
    const at::Tensor h_ND = ops::RmsNorm(x_ND, layer.input_norm, c.rms_norm_eps);
    q = RotatedHeads(model, layer, h_ND, layer.q, layer.q_norm, stream.positions_N, stream);
    k = RotatedHeads(model, layer, h_ND, layer.k, layer.k_norm, stream.positions_N, stream);
    v = ops::Linear(h_ND, layer.v);
    shape = {c.num_heads, layer.kv_layout, stream.positions_N, RoutedSegments(stream, Plan{}),
             store};
  }
};

/// Each head's K numbers, and one more.
at::Tensor Append(const at::Tensor& x, int64_t head_dim, const at::Tensor& last_N) {
  const at::Tensor heads = x.view({x.size(0), -1, head_dim});
  const at::Tensor last = last_N.view({-1, 1, 1}).expand({x.size(0), heads.size(1), 1});
  return at::cat({heads, last}, 2).view({x.size(0), -1});
}

/// W_O of the attention of all rows, every key's weight multiplied by its row's gate: softmax of
/// s_ij + ln g_j, ln g being one more dimension of the keys (training only).
at::Tensor SoftKeyAttention(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                            const Stream& stream, const at::Tensor& gate_N) {
  const Heads heads(model, layer, x_ND, stream, nullptr);
  const int64_t dim = model.config.head_dim, num_rows = x_ND.size(0);
  ops::AttendShape shape = heads.shape;
  shape.layout = {shape.layout.num_kv_heads, dim + 1};
  // Mix divides by √(K + 1).
  const double root = std::sqrt(static_cast<double>(dim + 1));
  const at::Tensor q = Append(heads.q * (root / std::sqrt(static_cast<double>(dim))), dim,
                              at::full({num_rows}, root));
  const at::Tensor k = Append(heads.k, dim, gate_N.clamp_min(1e-30).log());
  const at::Tensor v = Append(heads.v, dim, at::zeros({num_rows}));
  const at::Tensor y = ops::Mix(q, k, v, {.shape = shape});
  return ops::Linear(y.view({num_rows, -1, dim + 1}).slice(2, 0, dim).reshape({num_rows, -1}),
                     layer.o);
}

}  // namespace

at::Tensor RotatedHeads(const Model& model, const LayerWeights& layer, const at::Tensor& h,
                        const ops::Matrix& w, const at::Tensor& norm, const at::Tensor& positions,
                        const Stream& stream) {
  const int64_t dim = model.config.head_dim;
  at::Tensor heads = ops::Linear(h, w);
  if (norm.defined()) {
    const auto shape = heads.sizes().vec();
    heads = ops::RmsNorm(heads.view({-1, dim}), norm, model.config.rms_norm_eps).view(shape);
  }
  return layer.rotates ? ops::Rope(heads, positions, model.RopeTable(stream), dim) : heads;
}

at::Tensor WindowAttention(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                           const Stream& stream, const Plan& plan, ops::KvStore* store,
                           bool swapped) {
  const Heads heads(model, layer, x_ND, stream, store);
  return ops::Linear(
      ops::MixWindow(heads.q, heads.k, heads.v, heads.shape, WindowRowsOf(stream, plan, swapped)),
      layer.o);
}

at::Tensor Mixer(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                 const Stream& stream, const Plan& plan, ops::KvStore* store,
                 const ops::GatedKeys* gated) {
  std::optional<ops::GatedKeys> own;
  if (plan.key_gradient) own = KeysOf(model, layer, x_ND, stream, plan);
  const auto attention = [&](const Plan& p) {
    if (layer.sliding_window > 0) {
      const Heads heads(model, layer, x_ND, stream, store);
      const std::vector<uint8_t> none(x_ND.size(0));
      return ops::Linear(ops::MixWindow(heads.q, heads.k, heads.v, heads.shape,
                                        {{layer.sliding_window, 0}, none, none}),
                         layer.o);
    }
    if (p.bypass == Bypass::kWindow) {
      return WindowAttention(model, layer, x_ND, stream, p, store, /*swapped=*/false);
    }
    if (p.blocks.size > 0) {
      const Heads heads(model, layer, x_ND, stream, store);
      return ops::Linear(ops::MixBlocks(heads.q, heads.k, heads.v, heads.shape, p.blocks), layer.o);
    }
    if (plan.soft_keys && p.all_routed) {
      return SoftKeyAttention(model, layer, x_ND, stream, plan.gate_N);
    }
    return Attention(model, layer, x_ND, stream, p, store, own ? &*own : gated);
  };
  if (plan.soft) return AddSoftly(x_ND, plan, attention);
  const at::Tensor f = attention(plan);
  const at::Tensor y = plan.bypass == Bypass::kIdentity ? AddAnswer(x_ND, plan, f)
                                                        : ops::AddScaled(x_ND, f, plan.weight_N);
  if (!plan.counterfactual) return y;
  return ops::GateGradient(y, MixerDifference(model, layer, x_ND, y, stream, plan), plan.gate_N);
}

}  // namespace detour::model
