#include "routing/recursion.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "ops/linear.h"
#include "ops/rows.h"
#include "routing/controls.h"
#include "routing/mod.h"

namespace detour::routing {

std::vector<Option> RecursionOptions() {
  std::vector<Option> options = {
      IntOption("recursions", 3, 2, 64, "how often the layers run, N"),
      ChoiceOption("choice", "expert", {"expert", "token"},
                   "a recursion chooses tokens, or a token its depth"),
      NumberOption("alpha", 0, 0, 1e3, "scale of the gate; 0: 0.1 for expert, 1 for token"),
      ChoiceOption("causal", "bce", {"bce", "none"}, "expert: the rule that serves"),
      NumberOption("causal_coeff", 1e-3, 0, 1e3, "weight of its cross-entropy"),
      NumberOption("aux_loss_coeff", 0.1, 0, 1e3, "token: weight of the load-balance loss"),
      NumberOption("z_loss_coeff", 0, 0, 1e3, "token: weight of the squared log-sum-exp")};
  for (Option& o : ControlOptions()) options.push_back(std::move(o));
  return options;
}

void CheckRecursion(const RoutingConfig& config, std::vector<std::string>* faults) {
  const auto& layers = config.layers;
  const int64_t n = config.Int("recursions");
  if (!layers.empty() && layers.back() - layers.front() + 1 != std::ssize(layers)) {
    faults->push_back(fmt::format("layers: expected consecutive ones, got {} from {} to {}",
                                  layers.size(), layers.front(), layers.back()));
  }
  if (layers.empty() || std::ssize(layers) % n != 0) {
    faults->push_back(
        fmt::format("layers: expected a multiple of the {} recursions, got {}", n, layers.size()));
  }
}

namespace {

/// Where an unrolled layer is.
struct Place {
  int32_t first, cycle;       ///< the method's first layer; layers of a recursion
  int32_t recursion, offset;  ///< the layer's recursion, and its place in it
  int32_t num_recursions;

  Place(const RoutingConfig& config, int32_t layer)
      : first(config.layers.front()),
        num_recursions(static_cast<int32_t>(config.Int("recursions"))) {
    cycle = static_cast<int32_t>(std::ssize(config.layers)) / num_recursions;
    recursion = (layer - first) / cycle;
    offset = (layer - first) % cycle;
  }
  /// Of the rows that take this recursion: the capacity, and with even loads the share.
  double Share() const { return static_cast<double>(num_recursions - recursion) / num_recursions; }
};

double Alpha(const RoutingConfig& config) {
  if (config.Number("alpha") > 0) return config.Number("alpha");
  return config.Text("choice") == "expert" ? 0.1 : 1.0;
}

/// Rows go where an earlier layer's plan sends them.
class Follower : public Router {
 public:
  Follower(int32_t leader, double share) : Router(Site::kLayer), leader_(leader), share_(share) {}

  Plan Decide(const Taps& taps, const DecideArgs& args) const override {
    Plan plan;
    SetRows(args.replay ? RoutedFlags(*args.replay) : Rows(taps, args), &plan);
    plan.scores_NC = OneHot(plan);
    return plan;
  }
  double ServingShare(double) const override { return share_; }

 private:
  std::vector<uint8_t> Rows(const Taps& taps, const DecideArgs& args) const {
    DETOUR_CHECK(args.made);
    const Plan& leader = (*args.made)[leader_].layer;
    if (leader.deep.empty()) return RoutedFlags(leader);  // routers are off: all rows
    std::vector<uint8_t> rows(taps.stream.num_rows());
    for (const DeepSpan& s : leader.deep) {
      if (s.num_layers <= args.layer - leader_) continue;
      for (int64_t r = 0; r < s.rows.size(0); ++r) rows[ops::I32(s.rows)[r]] = 1;
    }
    return rows;
  }

  int32_t leader_;
  double share_;
};

/// What the routers at the start of a recursion have in common: a matrix of scores, or a control.
class Leader : public Router {
 public:
  Leader(const RoutingConfig& config, const Shape& shape, const Place& place, int64_t num_scores)
      : Router(Site::kLayer),
        place_(place),
        alpha_(Alpha(config)),
        control_(MakeControl(config, shape, "recursion_router.")) {
    if (!control_) score_.weight = at::zeros({num_scores, shape.dim});
  }

  void ForEachTensor(const TensorVisitor& visit) override {
    if (control_) return control_->ForEachTensor(visit);
    visit("recursion_router.weight", score_.weight);
  }
  void SetFrequencies(const std::vector<int64_t>& counts) override {
    if (control_) control_->SetFrequencies(counts);
  }
  double ServingShare(double) const override { return place_.Share(); }
  int64_t FlopsPerRow() const override { return control_ ? 0 : 2 * score_.weight.numel(); }

 protected:
  /// Recursions of a row, 1 to N, by the control: the same for all recursions.
  int32_t ControlDepth(const Stream& stream, int64_t row) const {
    const int64_t n = place_.num_recursions;
    return static_cast<int32_t>(n - control_->Choice(stream, place_.first, row, n));
  }

  Place place_;
  double alpha_;
  std::unique_ptr<Control> control_;
  ops::Matrix score_;
};

class ExpertChoice : public Leader {
 public:
  ExpertChoice(const RoutingConfig& config, const Shape& shape, const Place& place)
      : Leader(config, shape, place, 1),
        serves_(config.Text("causal") != "none"),
        causal_coeff_(config.Number("causal_coeff")) {
    if (!control_ && serves_ && !Everybody()) causal_bias_ = at::zeros({1});
  }

  Plan Decide(const Taps& taps, const DecideArgs& args) const override {
    const int64_t num_rows = taps.stream.num_rows();
    const std::vector<uint8_t> reached = Reached(num_rows, args);
    Plan plan;
    if (control_) {
      SetRows(args.replay ? RoutedFlags(*args.replay) : ControlRows(taps.stream, reached), &plan);
      plan.scores_NC = OneHot(plan);
      plan.span_weight_N = at::full({num_rows}, alpha_);
    } else {
      const at::Tensor score_N = ops::Linear(taps.x_ND, score_).squeeze(1);
      at::Tensor causal_N;  // logit of the rule that serves
      if (causal_bias_.defined()) causal_N = score_N + causal_bias_;
      SetRows(args.replay ? RoutedFlags(*args.replay)
                          : Choose(taps.stream, score_N, causal_N, reached, args),
              &plan);
      plan.span_weight_N = ops::Sigmoid(score_N) * alpha_;
      plan.scores_NC = Everybody()
                           ? OneHot(plan)
                           : Probabilities(causal_N.defined() ? causal_N : score_N, reached);
      if (args.mode != Mode::kInfer && causal_N.defined()) {
        LearnCausalRule(causal_N, reached, &plan);
      }
    }
    plan.deep = {{place_.cycle, plan.RoutedRows()}};
    return plan;
  }

  void ForEachTensor(const TensorVisitor& visit) override {
    Leader::ForEachTensor(visit);
    if (causal_bias_.defined()) visit("recursion_router.causal_bias", causal_bias_);
  }
  bool ShiftBias(double delta) override {
    const at::NoGradGuard no_grad;
    if (causal_bias_.defined()) causal_bias_.add_(delta);
    return causal_bias_.defined();
  }

 private:
  bool Everybody() const { return place_.recursion == 0; }

  /// Rows that took the recursion before.
  std::vector<uint8_t> Reached(int64_t num_rows, const DecideArgs& args) const {
    if (Everybody()) return std::vector<uint8_t>(num_rows, 1);
    DETOUR_CHECK(args.made);
    return RoutedFlags((*args.made)[args.layer - 1].layer);
  }

  std::vector<uint8_t> ControlRows(const Stream& stream, std::vector<uint8_t> reached) const {
    for (size_t n = 0; n < reached.size(); ++n) {
      reached[n] = reached[n] && ControlDepth(stream, static_cast<int64_t>(n)) > place_.recursion;
    }
    return reached;
  }

  std::vector<uint8_t> Choose(const Stream& stream, const at::Tensor& score_N,
                              const at::Tensor& causal_N, const std::vector<uint8_t>& reached,
                              const DecideArgs& args) const {
    if (Everybody()) return reached;
    const bool top_k = args.mode != Mode::kInfer;
    if (!top_k && !serves_) {
      Fail("routing.recursion",
           "layer {}: this model was trained with causal = \"none\": top-k looks at later tokens, "
           "so that it can be trained and evaluated teacher-forced, but not served. Hint: causal "
           "= \"bce\" or choice = \"token\"",
           args.layer);
    }
    const at::Tensor deciding_N = (top_k ? score_N : causal_N).contiguous();
    const float* values = ops::F32(deciding_N);
    std::vector<uint8_t> chosen(reached.size());
    if (top_k) {
      std::vector<float> scores(values, values + deciding_N.size(0));
      for (size_t n = 0; n < scores.size(); ++n) {
        if (!reached[n]) scores[n] = -INFINITY;
      }
      chosen = TopRows(stream, scores.data(), place_.Share());
    } else {
      for (size_t n = 0; n < chosen.size(); ++n) chosen[n] = values[n] > 0;
    }
    for (size_t n = 0; n < chosen.size(); ++n) chosen[n] = chosen[n] && reached[n];
    return chosen;
  }

  /// i32, the rows whose flag is set.
  static at::Tensor RowsOf(const std::vector<uint8_t>& flags) {
    Plan plan;
    SetRows(flags, &plan);
    return plan.RoutedRows();
  }

  /// Without gradient. A row that was not asked has none: it counts as the last to be let in.
  static at::Tensor Probabilities(const at::Tensor& logit_N, const std::vector<uint8_t>& reached) {
    at::Tensor asked = logit_N.detach().clone();
    for (size_t n = 0; n < reached.size(); ++n) {
      if (!reached[n]) ops::F32(asked)[n] = -80.0f;
    }
    return ops::Sigmoid(at::stack({asked, -asked}, 1));
  }

  /// Cross-entropy of the causal rule against top-k membership among the rows that were asked, and
  /// how often they agree (of rows that were not asked: always).
  void LearnCausalRule(const at::Tensor& causal_N, const std::vector<uint8_t>& reached,
                       Plan* plan) const {
    const at::Tensor asked = RowsOf(reached);
    const at::Tensor logit_R = causal_N.index_select(0, asked);
    const at::Tensor label_R = FlagTensor(*plan).index_select(0, asked);
    plan->causal_agreed = plan->num_rows - asked.size(0) +
                          logit_R.gt(0).eq(label_R.to(at::kBool)).sum().item<int64_t>();
    if (causal_coeff_ > 0) {
      // softplus(z) − y z. A mean over the rows that were asked, of which training has a fixed
      // share.
      const double of_asked = static_cast<double>(place_.num_recursions) /
                              (place_.num_recursions - place_.recursion + 1);
      plan->penalty =
          (at::softplus(logit_R) - label_R * logit_R).sum() * (causal_coeff_ * of_asked);
    }
  }

  bool serves_;
  double causal_coeff_;
  at::Tensor causal_bias_;
};

/// Chooses every row's depth before the first recursion.
class TokenChoice : public Leader {
 public:
  TokenChoice(const RoutingConfig& config, const Shape& shape, const Place& place)
      : Leader(config, shape, place, place.num_recursions),
        z_loss_coeff_(config.Number("z_loss_coeff")) {}

  Plan Decide(const Taps& taps, const DecideArgs& args) const override {
    const int64_t num_rows = taps.stream.num_rows(), n = place_.num_recursions;
    Plan plan = EveryRow(num_rows);
    at::Tensor logits_NE, probs_NE;
    if (!control_) {
      logits_NE = ops::Linear(taps.x_ND, score_);
      probs_NE = ops::Softmax(logits_NE);
    }
    const std::vector<int64_t> depths =
        args.replay ? Recorded(*args.replay) : Choose(taps.stream, probs_NE);
    std::vector<std::vector<int32_t>> rows(n);
    for (int64_t row = 0; row < num_rows; ++row) {
      rows[depths[row] - 1].push_back(static_cast<int32_t>(row));
    }
    for (int64_t i = 0; i < n; ++i) {
      plan.deep.push_back({static_cast<int32_t>(i + 1) * place_.cycle, RowTensor(rows[i])});
    }
    if (control_) {
      plan.span_weight_N = at::full({num_rows}, alpha_);
      return plan;
    }
    const at::Tensor index_N = at::tensor(depths, at::kLong) - 1;
    plan.span_weight_N = probs_NE.gather(1, index_N.unsqueeze(1)).squeeze(1) * alpha_;
    if (args.mode == Mode::kTrain) {
      plan.choice_NE = probs_NE;
      for (const auto& of_depth : rows) plan.choices.push_back(std::ssize(of_depth));
      if (z_loss_coeff_ > 0) {
        plan.penalty = at::logsumexp(logits_NE, 1).square().sum() * z_loss_coeff_;
      }
    }
    return plan;
  }

 private:
  std::vector<int64_t> Recorded(const Plan& plan) const {
    std::vector<int64_t> depths(plan.num_rows, place_.num_recursions);
    for (const DeepSpan& s : plan.deep) {
      for (int64_t r = 0; r < s.rows.size(0); ++r) {
        depths[ops::I32(s.rows)[r]] = s.num_layers / place_.cycle;
      }
    }
    return depths;
  }

  /// Of the largest probability; ties: the shallower.
  std::vector<int64_t> Choose(const Stream& stream, const at::Tensor& probs_NE) const {
    const int64_t n = place_.num_recursions;
    std::vector<int64_t> depths(stream.num_rows(), 1);
    for (int64_t row = 0; row < std::ssize(depths); ++row) {
      if (control_) {
        depths[row] = ControlDepth(stream, row);
        continue;
      }
      const float* p = ops::F32(probs_NE) + row * n;
      depths[row] = std::max_element(p, p + n) - p + 1;
    }
    return depths;
  }

  double z_loss_coeff_;
};

}  // namespace

std::vector<std::unique_ptr<Router>> MakeRecursion(const RoutingConfig& config, const Shape& shape,
                                                   int32_t layer) {
  const Place place(config, layer);
  const bool expert = config.Text("choice") == "expert";
  const int32_t leader = expert ? layer - place.offset : place.first;
  if (layer != leader) return OneRouter(std::make_unique<Follower>(leader, place.Share()));
  if (expert) return OneRouter(std::make_unique<ExpertChoice>(config, shape, place));
  return OneRouter(std::make_unique<TokenChoice>(config, shape, place));
}

int32_t RecursionWeightsLayer(const RoutingConfig& config, int32_t layer) {
  const Place place(config, layer);
  return place.first + place.offset;
}

}  // namespace detour::routing
