#include "train/fit_bypass.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "eval/batch.h"
#include "ops/attention.h"
#include "ops/linear.h"
#include "ops/rows.h"

namespace detour::train {

namespace {

constexpr int32_t kFirstRows = 4;  // of a document

/// The normal equations of one layer: attention's answer o [N, D] by the heads' own values
/// F [N, H, D], in f64.
class Fit {
 public:
  Fit(int32_t layer, routing::Router& router) : layer_(layer) {
    router.ForEachTensor([&](const std::string& name, at::Tensor& t) {
      if (name.ends_with("bypass_constant")) constant_D_ = t;
      if (name.ends_with("bypass_scale")) scale_H_ = t;
    });
  }
  bool wanted() const { return constant_D_.defined() || scale_H_.defined(); }
  int32_t layer() const { return layer_; }

  void Add(const at::Tensor& o_ND, const at::Tensor& f_NHD) {
    const at::Tensor flat_HX = f_NHD.transpose(0, 1).reshape({f_NHD.size(1), -1});
    Accumulate(flat_HX.matmul(flat_HX.t()), &ff_);
    Accumulate(flat_HX.matmul(o_ND.reshape({-1})), &fo_);
    Accumulate(f_NHD.sum(0), &f_);
    Accumulate(o_ND.sum(0), &o_);
    Accumulate(o_ND.square().sum(), &oo_);
    n_ += static_cast<double>(o_ND.size(0));
  }

  double Solve() {
    const at::NoGradGuard no_grad;
    const bool centred = constant_D_.defined();
    const double n = std::max(n_, 1.0);
    const at::Tensor ff = centred ? ff_ - f_.matmul(f_.t()) / n : ff_;
    const at::Tensor fo = centred ? fo_ - f_.matmul(o_) / n : fo_;
    at::Tensor a = at::ones({fo.size(0)}, at::kDouble);
    if (scale_H_.defined()) {
      const at::Tensor ridge = ff.diagonal().mean() * 1e-6 + 1e-30;
      a = at::linalg_solve(ff + ridge * at::eye(ff.size(0), at::kDouble), fo);
      scale_H_.copy_(a);
    }
    if (centred) constant_D_.copy_((o_ - a.matmul(f_)) / n);
    const at::Tensor total = centred ? oo_ - o_.dot(o_) / n : oo_;
    const at::Tensor left = total - 2 * a.dot(fo) + a.dot(ff.matmul(a));
    return 1 - (left / oo_.clamp_min(1e-30)).item<double>();
  }

 private:
  static void Accumulate(const at::Tensor& t, at::Tensor* sum) {
    *sum = sum->defined() ? *sum + t.to(at::kDouble) : t.to(at::kDouble);
  }

  int32_t layer_;
  at::Tensor constant_D_, scale_H_;
  at::Tensor ff_, fo_, f_, o_, oo_;
  double n_ = 0;
};

/// What each head's own value adds to each row, [N, H, D].
at::Tensor HeadValues(const model::ModelConfig& c, const model::LayerWeights& layer,
                      const at::Tensor& x_ND) {
  const at::Tensor h = ops::RmsNorm(x_ND, layer.input_norm, c.rms_norm_eps);
  const at::Tensor v = ops::RepeatKv(ops::Linear(h, layer.v), c.num_kv_heads, c.num_heads);
  const at::Tensor o_HKD = layer.o.weight.view({-1, c.num_heads, c.head_dim}).permute({1, 2, 0});
  return at::bmm(v.view({-1, c.num_heads, c.head_dim}).transpose(0, 1), o_HKD).transpose(0, 1);
}

}  // namespace

std::vector<FittedBypass> FitBypass(model::Model& model, const data::TokenShards& shards,
                                    int64_t seq_len, int64_t num_tokens) {
  const at::NoGradGuard no_grad;
  std::vector<Fit> fits;
  for (int32_t l = 0; l < model.config.num_layers; ++l) {
    routing::Router* router = model.layers[l].router(routing::Site::kMixer);
    if (!router) continue;
    Fit fit(l, *router);
    if (fit.wanted()) fits.push_back(std::move(fit));
  }
  const int64_t rows = std::min(seq_len, shards.num_tokens() - 1);
  const int64_t last = std::min(num_tokens, shards.num_tokens() - 1);
  for (int64_t first = 0; !fits.empty() && first + rows <= std::max(last, rows); first += rows) {
    const eval::Batch batch =
        eval::MakeBatch(shards, std::vector<int64_t>{first}, rows, /*document_attention=*/true);
    std::vector<at::Tensor> states;
    Forward(model, batch.ids_N, batch.stream, {.knobs = {.routed_layers = 0}, .states = &states});
    const at::Tensor inner = batch.stream.positions_N.ge(kFirstRows).nonzero().squeeze(1);
    const at::Tensor kept = inner.numel() > 0 ? inner : at::arange(rows);
    for (Fit& fit : fits) {
      const model::LayerWeights& layer = model.layers[fit.layer()];
      const at::Tensor x =
          fit.layer() == 0 ? model.embed.index_select(0, batch.ids_N) : states[fit.layer() - 1];
      const at::Tensor o = Mixer(model, layer, x, batch.stream, routing::Plan{}, nullptr) - x;
      fit.Add(o.index_select(0, kept),
              HeadValues(model.config, layer, x).index_select(0, kept).contiguous());
    }
  }
  std::vector<FittedBypass> figures;
  for (Fit& fit : fits) figures.push_back({fit.layer(), fit.Solve()});
  return figures;
}

}  // namespace detour::train
