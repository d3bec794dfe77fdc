// The forward pass of one layer. It knows rows and branches, and no method's name.
#include <ATen/ATen.h>

#include "model/model.h"
#include "ops/attention.h"
#include "ops/rows.h"

namespace detour::model {

at::Tensor Mixer(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                 const routing::Stream& stream, const routing::Plan& plan, ops::KvStore* store) {
  const ModelConfig& c = model.config;
  const at::Tensor h_ND = ops::RmsNorm(x_ND, layer.input_norm, c.rms_norm_eps);
  const at::Tensor h_RD = plan.all_routed ? h_ND : ops::GatherRows(h_ND, plan.rows_R);
  const ops::MixArgs args{.rows_R = plan.rows_R,
                          .bypass_rows = plan.bypass_rows,
                          .positions_R = RoutedPositions(stream, plan),
                          .segments = RoutedSegments(stream, plan),
                          .num_heads = c.num_heads,
                          .num_kv_heads = c.num_kv_heads,
                          .head_dim = c.head_dim,
                          .with_positions = layer.router != nullptr,
                          .store = store};
  const at::Tensor& rope = model.RopeTable(stream);
  const at::Tensor q = ops::Rope(ops::Linear(h_RD, layer.q), args.positions_R, rope, c.head_dim);
  const at::Tensor k = ops::Rope(ops::Linear(h_RD, layer.k), args.positions_R, rope, c.head_dim);
  const at::Tensor v = ops::Linear(h_ND, layer.v);
  return ops::AddScaled(x_ND, ops::Linear(ops::Mix(q, k, v, args), layer.o), plan.weight_N);
}

at::Tensor Ffn(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND) {
  const at::Tensor h_ND = ops::RmsNorm(x_ND, layer.post_norm, model.config.rms_norm_eps);
  const at::Tensor f_NF = ops::SiluMul(ops::Linear(h_ND, layer.gate), ops::Linear(h_ND, layer.up));
  return ops::AddScaled(x_ND, ops::Linear(f_NF, layer.down), at::Tensor());
}

}  // namespace detour::model
