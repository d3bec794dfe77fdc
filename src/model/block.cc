// The forward pass of one layer. It knows rows and ways, and no method's name.
#include <ATen/ATen.h>

#include <optional>

#include "model/counterfactual.h"
#include "model/model.h"
#include "ops/rows.h"

namespace detour::model {

using routing::Plan;
using routing::Site;
using routing::Stream;

namespace {

/// Without gradients in chunks of rows, so that the wide middle of a long pass never exists at
/// once.
at::Tensor SwiGlu(const at::Tensor& h_ND, const FfnWeights& w) {
  constexpr int64_t kChunk = 4096;
  if (at::GradMode::is_enabled() || h_ND.size(0) <= kChunk) {
    return ops::Linear(ops::SiluMul(ops::Linear(h_ND, w.gate), ops::Linear(h_ND, w.up)), w.down);
  }
  std::vector<at::Tensor> chunks;
  for (const at::Tensor& chunk : h_ND.split(kChunk)) chunks.push_back(SwiGlu(chunk, w));
  return at::cat(chunks);
}

/// The experts' answers for their rows, added to x in the experts' order, after the shared MLP's.
at::Tensor Experts(const LayerWeights& layer, at::Tensor x_ND, const at::Tensor& h_ND,
                   const Plan& plan) {
  if (layer.ffn.gate.weight.defined()) {
    const at::Tensor& gate = layer.shared_gate.weight;
    const at::Tensor weight_N =
        gate.defined() ? ops::Sigmoid(ops::Linear(h_ND, layer.shared_gate)).squeeze(1) : gate;
    x_ND = ops::AddScaled(x_ND, SwiGlu(h_ND, layer.ffn), weight_N);
  }
  std::vector<at::Tensor> rows, answers, weights;
  for (size_t e = 0; e < plan.experts.size(); ++e) {
    const routing::ExpertRows& expert = plan.experts[e];
    if (expert.rows.size(0) == 0) continue;
    rows.push_back(expert.rows);
    weights.push_back(expert.weight);
    answers.push_back(SwiGlu(ops::GatherRows(h_ND, expert.rows), layer.experts[e]));
  }
  if (rows.empty()) return x_ND;
  return ops::AddToRows(x_ND, at::cat(rows), at::cat(answers), at::cat(weights));
}

}  // namespace

at::Tensor AddAnswer(const at::Tensor& x_ND, const Plan& plan, const at::Tensor& f_RD) {
  if (plan.all_routed) return ops::AddScaled(x_ND, f_RD, plan.weight_N);
  const at::Tensor weight_R =
      plan.weight_N.defined() ? plan.weight_N.index_select(0, plan.rows_R) : at::Tensor();
  return ops::ReplaceRows(x_ND, plan.rows_R,
                          ops::AddScaled(ops::GatherRows(x_ND, plan.rows_R), f_RD, weight_R));
}

at::Tensor Ffn(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
               const Plan& plan) {
  const auto mlp = [&](const at::Tensor& x) {
    return SwiGlu(ops::RmsNorm(x, layer.post_norm, model.config.rms_norm_eps), layer.ffn);
  };
  if (plan.soft) return ops::AddScaled(x_ND, mlp(x_ND), plan.gate_N);
  const at::Tensor x_RD = plan.all_routed ? x_ND : ops::GatherRows(x_ND, plan.rows_R);
  const at::Tensor y = AddAnswer(x_ND, plan, mlp(x_RD));
  if (!plan.counterfactual) return y;
  return ops::GateGradient(y, FfnDifference(model, layer, x_ND, y, plan), plan.gate_N);
}

at::Tensor RunLayer(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                    const Stream& stream, const DecideFn& decide, ops::KvStore* store,
                    routing::LayerPlans* plans) {
  const at::Tensor none;
  std::optional<ops::GatedKeys> gated;
  const auto both = [&](const at::Tensor& x, const Stream& s) {
    plans->mixer = decide(Site::kMixer, {x, none, s});
    const at::Tensor y = Mixer(model, layer, x, s, plans->mixer, store, gated ? &*gated : nullptr);
    const bool experts = !layer.experts.empty();
    const at::Tensor h =
        experts ? ops::RmsNorm(y, layer.post_norm, model.config.rms_norm_eps) : none;
    plans->ffn = decide(Site::kFfn, {x, h, s});
    return experts ? Experts(layer, y, h, plans->ffn) : Ffn(model, layer, y, plans->ffn);
  };
  const Plan& plan = plans->layer = decide(Site::kLayer, {x_ND, none, stream});
  if (plan.soft) return ops::AddScaled(x_ND, both(x_ND, stream) - x_ND, plan.gate_N);
  if (plan.key_gradient) gated = KeysOf(model, layer, x_ND, stream, plan);
  const at::Tensor x_RD = plan.all_routed ? x_ND : ops::GatherRows(x_ND, plan.rows_R);
  at::Tensor y = both(x_RD, plan.all_routed ? stream : stream.Select(plan.rows_R));
  if (plan.weight_N.defined()) {
    y = AddAnswer(x_ND, plan, y - x_RD);
  } else if (!plan.all_routed) {
    y = ops::ReplaceRows(x_ND, plan.rows_R, y);
  }
  if (!plan.counterfactual) return y;
  return ops::GateGradient(y, LayerDifference(model, layer, x_ND, y, stream, plan), plan.gate_N);
}

}  // namespace detour::model
