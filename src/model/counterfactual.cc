#include "model/counterfactual.h"

#include <ATen/ATen.h>

#include "ops/attention.h"
#include "ops/rows.h"

namespace detour::model {

using routing::Bypass;
using routing::Plan;
using routing::Stream;

namespace {

/// Rows that took the span: what it changed. Rows that left it: `left_out_UD`.
at::Tensor JoinRows(const at::Tensor& changed_ND, const Plan& plan, const at::Tensor& left_out_UD) {
  if (plan.all_routed) return changed_ND;
  return ops::ReplaceRows(changed_ND, plan.bypass_rows, left_out_UD);
}

at::Tensor LeftOut(const at::Tensor& x_ND, const Plan& plan) {
  return ops::GatherRows(x_ND, plan.bypass_rows);
}

/// What the plan's value bypass adds to rows x.
at::Tensor ValueWay(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                    const Plan& plan) {
  const ModelConfig& c = model.config;
  const at::Tensor h = ops::RmsNorm(x_ND, layer.input_norm, c.rms_norm_eps);
  at::Tensor v = ops::RepeatKv(ops::Linear(h, layer.v), c.num_kv_heads, c.num_heads);
  if (plan.bypass_H.defined()) v = ops::ScaleHeads(v, plan.bypass_H);
  const at::Tensor bypass = ops::Linear(v, layer.o);
  return plan.bypass_D.defined() ? bypass + plan.bypass_D : bypass;
}

/// W_O of the attention of rows left out, among the plan's rows before them (write_all: all rows
/// up to themselves); rows before the first of those get 0.
at::Tensor AttendLeftOut(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                         const Stream& stream, const Plan& plan) {
  const ModelConfig& c = model.config;
  const at::Tensor h_ND = ops::RmsNorm(x_ND, layer.input_norm, c.rms_norm_eps);
  const auto rotated = [&](const at::Tensor& h, const at::Tensor& rows, const ops::Matrix& w,
                           const at::Tensor& norm) {
    return RotatedHeads(model, layer, h, w, norm, stream.positions_N.index_select(0, rows), stream);
  };
  const at::Tensor written = plan.write_all ? at::arange(plan.num_rows, at::kInt) : plan.rows_R;
  const at::Tensor h_WD = ops::GatherRows(h_ND, written);
  const at::Tensor attended = ops::AttendPrefix(
      rotated(LeftOut(h_ND, plan), plan.bypass_rows, layer.q, layer.q_norm),
      rotated(h_WD, written, layer.k, layer.k_norm), ops::Linear(h_WD, layer.v),
      Prefixes(stream, plan.bypass_rows, written), c.num_heads, c.num_kv_heads, c.head_dim);
  return ops::Linear(attended, layer.o);
}

}  // namespace

at::Tensor MixerDifference(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                           const at::Tensor& y_ND, const Stream& stream, const Plan& plan) {
  const at::NoGradGuard no_grad;
  at::Tensor difference = y_ND - x_ND;  // rows left out have the bypass here
  if (plan.bypass == Bypass::kWindow) {
    const at::Tensor other = WindowAttention(model, layer, x_ND, stream, plan, nullptr, true);
    return (difference - other) * (2 * FlagTensor(plan) - 1).unsqueeze(1);
  }
  if (!plan.all_routed) {
    difference = JoinRows(difference, plan, AttendLeftOut(model, layer, x_ND, stream, plan));
  }
  if (plan.bypass == Bypass::kIdentity) return difference;
  return difference - ValueWay(model, layer, x_ND, plan);
}

at::Tensor FfnDifference(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                         const at::Tensor& y_ND, const Plan& plan) {
  const at::NoGradGuard no_grad;
  if (plan.all_routed) return y_ND - x_ND;
  const at::Tensor x_UD = LeftOut(x_ND, plan);
  return JoinRows(y_ND - x_ND, plan, Ffn(model, layer, x_UD, Plan{}) - x_UD);
}

at::Tensor LayerDifference(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                           const at::Tensor& y_ND, const Stream& stream, const Plan& plan) {
  const at::NoGradGuard no_grad;
  if (plan.all_routed) return y_ND - x_ND;
  const at::Tensor x_UD = LeftOut(x_ND, plan);
  const at::Tensor attended = x_UD + AttendLeftOut(model, layer, x_ND, stream, plan);
  return JoinRows(y_ND - x_ND, plan, Ffn(model, layer, attended, Plan{}) - x_UD);
}

ops::GatedKeys KeysOf(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                      const Stream& stream, const Plan& plan) {
  const at::NoGradGuard no_grad;
  const ModelConfig& c = model.config;
  const at::Tensor h_ND = ops::RmsNorm(x_ND, layer.input_norm, c.rms_norm_eps);
  return {RotatedHeads(model, layer, h_ND, layer.k, layer.k_norm, stream.positions_N, stream),
          ops::Linear(h_ND, layer.v), plan.gate_N,
          plan.all_routed ? at::arange(plan.num_rows, at::kInt) : plan.rows_R,
          RoutedSegments(stream, Plan{})};
}

at::Tensor AddSoftly(const at::Tensor& x_ND, const Plan& plan,
                     const std::function<at::Tensor(const Plan&)>& attention) {
  const at::Tensor y = ops::AddScaled(x_ND, attention(Plan{}), plan.gate_N);
  if (plan.bypass == Bypass::kIdentity) return y;
  Plan nobody{.bypass = plan.bypass,
              .bypass_D = plan.bypass_D,
              .bypass_H = plan.bypass_H,
              .window = plan.window};
  SetRows(std::vector<uint8_t>(x_ND.size(0), 0), &nobody);
  return ops::AddScaled(y, attention(nobody), 1 - plan.gate_N);
}

}  // namespace detour::model
