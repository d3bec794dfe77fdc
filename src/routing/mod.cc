#include "routing/mod.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "ops/rows.h"
#include "routing/controls.h"
#include "routing/gate.h"

namespace detour::routing {

std::vector<Option> ModOptions() {
  std::vector<Option> options = {
      NumberOption("capacity", 0.125, 1e-6, 1, "share of a document's tokens that take the layer"),
      ChoiceOption("causal", "bce", {"bce", "predictor", "none"}, "the rule that serves"),
      NumberOption("causal_coeff", 0.01, 0, 1e3, "weight of its cross-entropy"),
      IntOption("hidden", 0, 0, 1 << 17, "the predictor's hidden width; 0: half the model's")};
  for (Option& o : ControlOptions()) options.push_back(std::move(o));
  return options;
}

std::vector<uint8_t> TopRows(const Stream& stream, const float* scores, double capacity) {
  std::vector<uint8_t> top(stream.num_rows());
  std::vector<int32_t> order;
  for (const Segment& s : stream.segments) {
    order.resize(s.end - s.begin);
    std::iota(order.begin(), order.end(), static_cast<int32_t>(s.begin));
    const auto k =
        std::min<int64_t>(std::ceil(capacity * std::ssize(order) - 1e-9), std::ssize(order));
    std::nth_element(order.begin(), order.begin() + std::max<int64_t>(k - 1, 0), order.end(),
                     [&](int32_t a, int32_t b) {
                       return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
                     });
    for (int64_t i = 0; i < k; ++i) top[order[i]] = 1;
  }
  return top;
}

namespace {

class ModRouter : public Router {
 public:
  ModRouter(const RoutingConfig& config, const Shape& shape)
      : Router(Site::kLayer),
        capacity_(config.Number("capacity")),
        causal_(config.Text("causal")),
        causal_coeff_(config.Number("causal_coeff")),
        control_(MakeControl(config, shape, "mod_router.")) {
    if (control_) return;
    score_.weight = at::zeros({1, shape.dim});
    if (causal_ == "bce") causal_bias_ = at::zeros({1});
    if (causal_ == "predictor") {
      const int64_t hidden = config.Int("hidden");
      predictor_ =
          MakeScorer("mlp", shape, hidden > 0 ? hidden : std::max<int64_t>(shape.dim / 2, 1),
                     "mod_router.predictor.");
    }
  }

  Plan Decide(const Taps& taps, const DecideArgs& args) const override {
    Plan plan;
    if (control_) {
      SetRows(args.replay ? RoutedFlags(*args.replay) : control_->Rows(taps.stream, args.layer),
              &plan);
      // A logit of ±20: a probability of 1 or 0 to eight digits.
      plan.scores_NC = Probabilities(40 * FlagTensor(plan) - 20);
      return plan;
    }
    const bool top_k = args.mode != Mode::kInfer;
    if (causal_ == "none" && !top_k) {
      Fail("routing.mod",
           "layer {}: this model was trained with causal = \"none\": top-k looks at later tokens, "
           "so that it can be trained and evaluated teacher-forced, but not served. Hint: causal "
           "= \"bce\" or \"predictor\"",
           args.layer);
    }
    const at::Tensor score_N = ops::Linear(taps.x_ND, score_).squeeze(1);
    at::Tensor causal_N;  // logit of the rule that serves
    if (causal_ == "bce") causal_N = score_N + causal_bias_;
    if (causal_ == "predictor") causal_N = predictor_->Difference(taps.x_ND.detach());
    const at::Tensor deciding_N = (top_k ? score_N : causal_N).contiguous();
    if (args.replay) {
      SetRows(RoutedFlags(*args.replay), &plan);
    } else if (top_k) {
      const double capacity = args.knobs.capacity > 0 ? args.knobs.capacity : capacity_;
      SetRows(TopRows(taps.stream, ops::F32(deciding_N), capacity), &plan);
    } else {
      std::vector<uint8_t> flags(deciding_N.size(0));
      for (size_t n = 0; n < flags.size(); ++n) flags[n] = ops::F32(deciding_N)[n] > 0;
      SetRows(flags, &plan);
    }
    plan.weight_N = score_N;
    plan.scores_NC = Probabilities((causal_N.defined() ? causal_N : score_N).detach());
    if (top_k && causal_N.defined()) LearnCausalRule(causal_N, &plan);
    return plan;
  }

  void ForEachTensor(const TensorVisitor& visit) override {
    if (control_) return control_->ForEachTensor(visit);
    visit("mod_router.weight", score_.weight);
    if (causal_bias_.defined()) visit("mod_router.causal_bias", causal_bias_);
    if (predictor_) predictor_->ForEachTensor(visit);
  }
  void Initialize() override {
    if (predictor_) predictor_->Initialize();
  }
  bool ShiftBias(double delta) override {
    const at::NoGradGuard no_grad;
    if (causal_bias_.defined()) causal_bias_.add_(delta);
    if (predictor_) predictor_->ShiftBias(delta);
    return causal_bias_.defined() || predictor_;
  }
  void SetFrequencies(const std::vector<int64_t>& counts) override {
    if (control_) control_->SetFrequencies(counts);
  }
  int64_t FlopsPerRow() const override {
    if (control_) return 0;
    return 2 * score_.weight.numel() + (predictor_ ? predictor_->FlopsPerRow() : 0);
  }

 private:
  static at::Tensor Probabilities(const at::Tensor& logit_N) {
    return ops::Sigmoid(at::stack({logit_N, -logit_N}, 1));
  }

  /// Cross-entropy of the causal rule against top-k membership, and how often they agree.
  void LearnCausalRule(const at::Tensor& causal_N, Plan* plan) const {
    const at::Tensor label = FlagTensor(*plan);
    plan->causal_agreed = causal_N.gt(0).eq(label.to(at::kBool)).sum().item<int64_t>();
    if (causal_coeff_ > 0) {
      // softplus(z) − y z, summed over rows.
      plan->penalty = (at::softplus(causal_N) - label * causal_N).sum() * causal_coeff_;
    }
  }

  double capacity_;
  std::string causal_;
  double causal_coeff_;
  std::unique_ptr<Control> control_;
  ops::Matrix score_;
  at::Tensor causal_bias_;
  std::unique_ptr<GateScorer> predictor_;
};

}  // namespace

std::vector<std::unique_ptr<Router>> MakeMod(const RoutingConfig& config, const Shape& shape,
                                             int32_t) {
  return OneRouter(std::make_unique<ModRouter>(config, shape));
}

}  // namespace detour::routing
