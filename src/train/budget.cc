#include "train/budget.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "ops/linear.h"
#include "routing/registry.h"

namespace detour::train {

using routing::Plan;
using routing::Site;

namespace {

double Sum(const at::Tensor& t) { return t.sum(at::kDouble).item<double>(); }

void AddTo(at::Tensor* total, const at::Tensor& term) {
  *total = total->defined() ? *total + term : term;
}

}  // namespace

Budgets::Budgets(const model::ModelConfig& c)
    : config_(c), routers_(model::Routers(c)), members_(c.routing.size()) {
  const auto d = static_cast<double>(c.hidden_size);
  const auto q = static_cast<double>(c.num_heads * c.head_dim);
  const auto kv = static_cast<double>(c.num_kv_heads * c.head_dim);
  for (size_t i = 0; i < c.routing.size(); ++i) {
    const routing::RoutingConfig& method = c.routing[i];
    const auto& sites = routing::FindMethod(method.method).sites;
    const bool value = method.TextOr("bypass", "identity") != "identity";
    const double mixer = 2 * d * (q + kv) + (value ? 0 : 2 * d * (q + kv));
    const double ffn = 6 * d * static_cast<double>(c.intermediate_size);  // gates have no experts
    for (size_t r = 0; r < routers_.size(); ++r) {
      const Site site = routers_[r].site;
      if (!method.HasLayer(routers_[r].layer) ||
          std::find(sites.begin(), sites.end(), site) == sites.end()) {
        continue;
      }
      const double row = (site != Site::kFfn ? mixer : 0) + (site != Site::kMixer ? ffn : 0);
      members_[i].push_back({r, row, site == Site::kFfn ? 0 : 4 * q});
    }
  }
}

const Plan& Budgets::PlanOfRouter(const Taken& taken, size_t router) const {
  return *PlanOf(taken.plans[routers_[router].layer], routers_[router].site).plan;
}

/// Σ_t g_t (c_row + c_key Σ_{s≤t} g_s) over the documents of the stream.
at::Tensor Budgets::Compute(const Member& m, const Taken& taken, bool all_rows) const {
  const Plan& plan = PlanOfRouter(taken, m.router);
  const at::Tensor g = all_rows || !plan.gate_N.defined() ? at::ones({plan.num_rows}) : plan.gate_N;
  at::Tensor total = g.sum() * m.row_flops;
  if (m.key_flops == 0 || g.size(0) != taken.stream.num_rows()) return total;
  for (const routing::Segment& s : taken.stream.segments) {
    const at::Tensor part = g.slice(0, s.begin, s.end);
    total = total + (part * part.cumsum(0)).sum() * m.key_flops;
  }
  return total;
}

void Budgets::Add(const Taken& taken, BatchStatistics* statistics) const {
  const at::NoGradGuard no_grad;
  statistics->num_rows += taken.stream.num_rows();
  statistics->routers.resize(routers_.size());
  statistics->taken_flops.resize(members_.size());
  statistics->all_flops.resize(members_.size());
  statistics->counted_rows.resize(members_.size());
  for (size_t r = 0; r < routers_.size(); ++r) {
    const Plan& plan = PlanOfRouter(taken, r);
    RouterStatistics& s = statistics->routers[r];
    s.num_rows += plan.num_rows;
    s.num_routed += plan.NumRouted();
    if (plan.gate_N.defined()) s.sum_gate += Sum(plan.gate_N);
    s.choices.resize(plan.choices.size());
    for (size_t e = 0; e < plan.choices.size(); ++e) s.choices[e] += plan.choices[e];
  }
  for (size_t i = 0; i < members_.size(); ++i) {
    const routing::RoutingConfig& c = config_.routing[i];
    if (!c.options.contains("budget")) continue;
    statistics->counted_rows[i] +=
        taken.stream.positions_N.ge(c.Int("reserved")).sum().item<int64_t>();
    if (c.Text("budget") != "compute") continue;
    for (const Member& m : members_[i]) {
      statistics->taken_flops[i] += Compute(m, taken, false).item<double>();
      statistics->all_flops[i] += Compute(m, taken, true).item<double>();
    }
  }
}

/// Σ over tokens of |mean over all layers of the gate − target|; a layer without gate counts 1, one
/// with two their mean.
at::Tensor Budgets::TokenBudget(size_t method, const Taken& taken) const {
  std::map<int32_t, std::vector<at::Tensor>> gates;  // by layer
  for (const Member& m : members_[method]) {
    if (const Plan& plan = PlanOfRouter(taken, m.router); plan.gate_N.defined()) {
      gates[routers_[m.router].layer].push_back(plan.gate_N);
    }
  }
  at::Tensor sum_N;
  for (const auto& [layer, of_layer] : gates) {
    for (const at::Tensor& gate_N : of_layer) {
      AddTo(&sum_N, gate_N / static_cast<double>(of_layer.size()));
    }
  }
  if (!sum_N.defined()) return sum_N;
  const routing::RoutingConfig& c = config_.routing[method];
  const double without = config_.num_layers - static_cast<double>(gates.size());
  const at::Tensor off = ((sum_N + without) / config_.num_layers - c.Number("budget_target")).abs();
  return (off * taken.stream.positions_N.ge(c.Int("reserved"))).sum();
}

Budgets::Loss Budgets::Of(const Taken& taken, const BatchStatistics& statistics,
                          const std::vector<double>& weights) const {
  Loss result;
  const auto num_rows = static_cast<double>(statistics.num_rows);
  // Adds weight · coefficient · term, and counts coefficient · term − offset as the budget's value.
  const auto add = [&](double weight, double coefficient, const at::Tensor& term, double offset) {
    result.unweighted += coefficient * term.item<double>() - offset;
    if (weight != 0) AddTo(&result.loss, term * (weight * coefficient));
  };
  for (size_t i = 0; i < members_.size(); ++i) {
    const routing::RoutingConfig& c = config_.routing[i];
    double sum_share = 0, sum_gate = 0, sum_rows = 0;
    for (const Member& m : members_[i]) {
      const RouterStatistics& s = statistics.routers[m.router];
      sum_share += statistics.Share(m.router);
      sum_gate += s.sum_gate;
      sum_rows += static_cast<double>(s.num_rows);
    }
    const double target = c.NumberOr("budget_target", 0), excess = sum_gate / sum_rows - target;
    const std::string budget = c.TextOr("budget", "experts");
    if (budget == "target_token_l1") {
      if (const at::Tensor t = TokenBudget(i, taken); t.defined()) {
        add(weights[i], 1 / static_cast<double>(std::max<int64_t>(statistics.counted_rows[i], 1)),
            t, 0);
      }
    }
    for (const Member& m : members_[i]) {
      const Plan& plan = PlanOfRouter(taken, m.router);
      if (plan.penalty.defined()) AddTo(&result.loss, plan.penalty / num_rows);
      const at::Tensor& probs_NE = plan.choice_NE.defined() ? plan.choice_NE : plan.scores_NC;
      if (budget == "experts" && probs_NE.requires_grad()) {
        const RouterStatistics& s = statistics.routers[m.router];
        double all = 0;
        for (int64_t n : s.choices) all += static_cast<double>(n);
        at::Tensor f = at::zeros({probs_NE.size(1)});
        for (size_t e = 0; e < s.choices.size(); ++e) f[e] = s.choices[e] / std::max(all, 1.0);
        add(weights[i], static_cast<double>(s.choices.size()) / num_rows,
            (probs_NE.sum(0) * f).sum(), 0);
      }
      if (!plan.gate_N.defined()) continue;
      const double share_of_rows = static_cast<double>(plan.num_rows) / sum_rows;
      if (budget == "mean_prob" && sum_share > 0) {
        const RouterStatistics& s = statistics.routers[m.router];
        add(weights[i], statistics.Share(m.router) / sum_share / static_cast<double>(s.num_rows),
            plan.gate_N.sum(), 0);
      } else if (budget == "target_l1") {
        const double sign = excess > 0 ? 1 : -1;
        add(weights[i], sign / sum_rows, plan.gate_N.sum(), sign * target * share_of_rows);
      } else if (budget == "target_l2") {
        // d/dm (m − t)² = 2 (m − t); its value is half of the linear term's.
        add(2 * weights[i], excess / sum_rows, plan.gate_N.sum(), excess * target * share_of_rows);
      } else if (budget == "compute") {
        // A penalty above the target; with a dual variable always, the variable is 0 below it.
        const double all = statistics.all_flops[i];
        const bool active = c.Number("dual_rate") > 0 || statistics.taken_flops[i] > target * all;
        add(active ? weights[i] : 0.0, 1 / all, Compute(m, taken, false), 0);
      }
    }
  }
  return result;
}

}  // namespace detour::train
