// The forward pass of one layer. It knows rows and ways, and no method's name.
#include <ATen/ATen.h>

#include <optional>

#include "model/counterfactual.h"
#include "model/model.h"
#include "ops/attention.h"
#include "ops/rows.h"

namespace detour::model {

using routing::Bypass;
using routing::Plan;
using routing::Site;
using routing::Stream;

namespace {

/// W_O of the attention of the plan's rows among the entries of their documents. Keys are those
/// rows' own, or with write_all every row's. With the value bypass the other rows get W_O of their
/// own value, and the answer has all rows, else the plan's rows.
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
  const ops::MixArgs args{.rows_R = plan.rows_R,
                          .bypass_rows = value ? plan.bypass_rows : at::Tensor(),
                          .positions_W = all_write ? stream.positions_N : positions_R,
                          .segments = RoutedSegments(stream, all_write ? Plan{} : plan),
                          .num_heads = c.num_heads,
                          .num_kv_heads = c.num_kv_heads,
                          .head_dim = c.head_dim,
                          .with_positions = layer.ragged(),
                          .store = store};
  const at::Tensor& rope = model.RopeTable(stream);
  const at::Tensor q = ops::Rope(ops::Linear(h_RD, layer.q), positions_R, rope, c.head_dim);
  const at::Tensor k =
      ops::Rope(ops::Linear(all_write ? h_ND : h_RD, layer.k), args.positions_W, rope, c.head_dim);
  at::Tensor y = ops::Mix(q, k, ops::Linear(h_ND, layer.v), args);
  if (gated) {
    const bool join = args.bypass_rows.defined();
    const at::Tensor y_RW = join ? ops::GatherRows(y, plan.rows_R) : y;
    const at::Tensor counted = ops::CountKeys(y_RW, q, *gated, c.num_kv_heads, c.head_dim);
    y = join ? ops::ReplaceRows(y, plan.rows_R, counted) : counted;
  }
  return ops::Linear(y, layer.o);
}

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

/// f with the bypass's constant added to the rows that take it.
at::Tensor AddConstant(const at::Tensor& f_ND, const Plan& plan) {
  const at::Tensor rows = ops::GatherRows(f_ND, plan.bypass_rows) + plan.bypass_D;
  return ops::ReplaceRows(f_ND, plan.bypass_rows, rows);
}

/// x with f_RD, the answer for the plan's rows, added to those with their weights.
at::Tensor AddAnswer(const at::Tensor& x_ND, const Plan& plan, const at::Tensor& f_RD) {
  if (plan.all_routed) return ops::AddScaled(x_ND, f_RD, plan.weight_N);
  const at::Tensor weight_R =
      plan.weight_N.defined() ? plan.weight_N.index_select(0, plan.rows_R) : at::Tensor();
  return ops::ReplaceRows(x_ND, plan.rows_R,
                          ops::AddScaled(ops::GatherRows(x_ND, plan.rows_R), f_RD, weight_R));
}

}  // namespace

at::Tensor Mixer(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                 const Stream& stream, const Plan& plan, ops::KvStore* store,
                 const ops::GatedKeys* gated) {
  std::optional<ops::GatedKeys> own;
  if (plan.key_gradient) own = KeysOf(model, layer, x_ND, stream, plan);
  const auto attention = [&](const Plan& p) {
    return Attention(model, layer, x_ND, stream, p, store, own ? &*own : gated);
  };
  if (plan.soft) return AddSoftly(x_ND, plan, attention);
  at::Tensor f = attention(plan);
  if (plan.bypass_D.defined() && !plan.all_routed) f = AddConstant(f, plan);
  const at::Tensor y = plan.bypass == Bypass::kValue ? ops::AddScaled(x_ND, f, plan.weight_N)
                                                     : AddAnswer(x_ND, plan, f);
  if (!plan.counterfactual) return y;
  return ops::GateGradient(y, MixerDifference(model, layer, x_ND, y, stream, plan), plan.gate_N);
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

/// The experts' answers for their rows, added to x in the experts' order, after the shared MLP's.
at::Tensor Experts(const LayerWeights& layer, at::Tensor x_ND, const at::Tensor& h_ND,
                   const Plan& plan) {
  if (layer.ffn.gate.weight.defined()) {
    x_ND = ops::AddScaled(x_ND, SwiGlu(h_ND, layer.ffn), at::Tensor());
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
