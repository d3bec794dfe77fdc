#include "model/exit.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/json.h"
#include "model/model.h"
#include "ops/rows.h"
#include "routing/registry.h"

namespace detour::model {

ExitRule::Kind ParseExitKind(const std::string& name) {
  if (name == "none") return ExitRule::Kind::kNone;
  if (name == "margin") return ExitRule::Kind::kMargin;
  if (name == "state") return ExitRule::Kind::kState;
  Fail("flag.exit", "--exit: expected none, margin or state, got \"{}\"", Printable(name));
}

void CheckExit(const Model& model, const ExitRule& rule) {
  if (rule.kind == ExitRule::Kind::kNone) return;
  if (!model.config.slides.empty()) {
    Fail("flag.exit",
         "--exit: expected a model with full attention, this one slides a window of {}",
         model.config.sliding_window);
  }
  for (const routing::RoutingConfig& r : model.config.routing) {
    if (routing::FindMethod(r.method).exit_weights) continue;
    std::string names = "dense";
    for (const routing::Method& m : routing::Methods()) {
      if (m.exit_weights) names += fmt::format(" or {}", m.name);
    }
    Fail("flag.exit", "--exit: expected a {} model, got method {}", names, r.method);
  }
}

namespace {

/// Difference of the two largest values.
double Margin(const float* p, int64_t n) {
  float first = 0, second = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (p[i] > first) {
      second = first;
      first = p[i];
    } else {
      second = std::max(second, p[i]);
    }
  }
  return first - second;
}

double Cosine(const float* a, const float* b, int64_t n) {
  double ab = 0, aa = 0, bb = 0;
  for (int64_t i = 0; i < n; ++i) {
    ab += static_cast<double>(a[i]) * b[i];
    aa += static_cast<double>(a[i]) * a[i];
    bb += static_cast<double>(b[i]) * b[i];
  }
  return ab / std::max(std::sqrt(aa) * std::sqrt(bb), 1e-30);
}

}  // namespace

void ExitState::Update(const Model& model, const ExitRule& rule, int32_t layer,
                       const at::Tensor& before_ND, const at::Tensor& x_ND) {
  if (layer < rule.first_layer || layer + 1 == model.config.num_layers) return;
  routing::Plan plan;
  SetRows(active_, &plan);
  const int64_t num_active = plan.NumRouted(), dim = x_ND.size(1);
  if (num_active == 0) return;
  const at::Tensor rows = plan.all_routed ? at::arange(plan.num_rows, at::kInt) : plan.rows_R;
  at::Tensor probs;
  if (rule.kind == ExitRule::Kind::kMargin) {
    const at::Tensor h =
        ops::RmsNorm(ops::GatherRows(x_ND, rows), model.norm, model.config.rms_norm_eps);
    probs = ops::Softmax(Logits(model, h));
  }
  for (int64_t r = 0; r < num_active; ++r) {
    const int64_t n = ops::I32(rows)[r];
    const double confidence =
        probs.defined() ? Margin(ops::F32(probs) + r * probs.size(1), probs.size(1))
                        : Cosine(ops::F32(before_ND) + n * dim, ops::F32(x_ND) + n * dim, dim);
    if (confidence >= rule.threshold) active_[n] = 0;
  }
}

routing::LayerPlans ExitState::Plans() const {
  routing::LayerPlans plans;
  SetRows(active_, &plans.mixer);
  SetRows(active_, &plans.ffn);
  plans.mixer.write_all = true;
  plans.mixer.scores_NC = OneHot(plans.mixer);
  return plans;
}

}  // namespace detour::model
