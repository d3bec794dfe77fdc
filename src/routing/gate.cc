#include "routing/gate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "core/rng.h"
#include "ops/rows.h"
#include "routing/controls.h"

namespace detour::routing {

std::vector<Option> GateOptions() {
  std::vector<Option> options = {
      ChoiceOption("scorer", "mlp", {"mlp", "linear", "norm_mlp"}, "the router's network"),
      IntOption("hidden", 0, 0, 1 << 17, "its hidden width; 0: half the model's"),
      ChoiceOption("estimator", "prob_gate", {"prob_gate", "ste", "gumbel_ste", "soft"},
                   "how the decision carries a gradient"),
      NumberOption("temperature", 1.0, 1e-3, 1e3, "of the Gumbel noise"),
      ChoiceOption("bypass", "identity", {"identity", "value", "constant", "window"},
                   "what a row does that does not attend"),
      FlagOption("value_scale", false,
                 "the value and constant bypass weigh each head's value by a learned number"),
      IntOption("window", 128, 1, 1 << 30, "tokens that the window bypass sees, itself included"),
      IntOption("sink", 4, 1, 1 << 30, "first tokens of a document that it sees too"),
      ChoiceOption("kv", "executed", {"executed", "all"}, "rows that write keys and values"),
      FlagOption("key_gradient", false, "a key that is not written carries gradient (ste)"),
      FlagOption("soft_keys", false, "a key counts as much as its row attends (soft)"),
      IntOption("reserved", 0, 0, 1 << 20, "first tokens of a document that always take the span"),
      ChoiceOption("budget", "none",
                   {"none", "mean_prob", "target_l1", "target_l2", "target_token_l1", "compute"},
                   "loss on the gates"),
      NumberOption("aux_loss_coeff", 0, 0, 1e6, "its weight"),
      NumberOption("budget_target", 0.5, 0, 1, "the share it aims at (target_*, compute)"),
      NumberOption("dual_rate", 0, 0, 1e6,
                   "compute as a constraint: the weight rises by this times the excess a step"),
      NumberOption("fallback_share", 0, 0, 1,
                   "share of rows drawn where a training batch took none")};
  for (Option& o : ControlOptions()) options.push_back(std::move(o));
  return options;
}

void CheckGate(const RoutingConfig& config, std::vector<std::string>* faults) {
  if (config.Text("bypass") != "identity" && config.Text("kv") == "all") {
    faults->push_back(
        "bypass and kv \"all\" do not go together: with every key written "
        "the bypass is \"identity\"");
  }
  if (config.Flag("value_scale") && config.Text("bypass") != "value" &&
      config.Text("bypass") != "constant") {
    faults->push_back("value_scale: expected bypass \"value\" or \"constant\" with it, got \"" +
                      config.Text("bypass") + "\"");
  }
  if (config.Text("bypass") == "window" && config.Flag("key_gradient")) {
    faults->push_back("key_gradient: with bypass \"window\" every key is written for a while");
  }
  if (config.Flag("soft_keys") && config.Text("estimator") != "soft") {
    faults->push_back("soft_keys: expected estimator \"soft\" with it, got \"" +
                      config.Text("estimator") + "\"");
  }
}

void CheckLayerGate(const RoutingConfig& config, std::vector<std::string>* faults) {
  if (config.Text("bypass") != "identity") {
    faults->push_back(
        "bypass: expected \"identity\": rows that skip a whole layer get nothing of it");
  }
  if (config.Text("kv") == "all") {
    faults->push_back("kv: expected \"executed\": rows that skip a whole layer write no keys");
  }
  if (config.Flag("soft_keys")) {
    faults->push_back("soft_keys: expected false: this gate is a layer's, not attention's");
  }
}

namespace {

/// A last layer that says `margin` for way `way` of two and 0 for the other, whatever the row.
void SetAll(double margin, int64_t way, ops::Matrix* last) {
  at::NoGradGuard no_grad;
  last->weight.zero_();
  last->bias.zero_();
  last->bias[way].fill_(margin);
}

class Mlp : public GateScorer {
 public:
  Mlp(int64_t dim, int64_t hidden, std::string prefix) : prefix_(std::move(prefix)) {
    first_.weight = at::zeros({hidden, dim});
    first_.bias = at::zeros({hidden});
    second_.weight = at::zeros({2, hidden});
    second_.bias = at::zeros({2});
  }
  at::Tensor Difference(const at::Tensor& x_ND) const override {
    const at::Tensor logits_N2 = ops::Linear(ops::Silu(ops::Linear(x_ND, first_)), second_);
    return logits_N2.select(1, 0) - logits_N2.select(1, 1);
  }
  void ForEachTensor(const TensorVisitor& visit) override {
    visit(prefix_ + "weight_predictor.0.weight", first_.weight);
    visit(prefix_ + "weight_predictor.0.bias", first_.bias);
    visit(prefix_ + "weight_predictor.2.weight", second_.weight);
    visit(prefix_ + "weight_predictor.2.bias", second_.bias);
  }
  void ShiftBias(double delta) override {
    at::NoGradGuard no_grad;
    second_.bias[0].add_(delta);
  }
  void Open(double margin) override { SetAll(margin, 0, &second_); }
  int64_t FlopsPerRow() const override {
    return 2 * (first_.weight.numel() + second_.weight.numel());
  }

 private:
  std::string prefix_;
  ops::Matrix first_, second_;
};

class LinearScorer : public GateScorer {
 public:
  LinearScorer(int64_t dim, std::string prefix) : prefix_(std::move(prefix)) {
    only_.weight = at::zeros({2, dim});
    only_.bias = at::zeros({2});
  }
  at::Tensor Difference(const at::Tensor& x_ND) const override {
    const at::Tensor logits_N2 = ops::Linear(x_ND, only_);
    return logits_N2.select(1, 0) - logits_N2.select(1, 1);
  }
  void ForEachTensor(const TensorVisitor& visit) override {
    visit(prefix_ + "weight_predictor.0.weight", only_.weight);
    visit(prefix_ + "weight_predictor.0.bias", only_.bias);
  }
  void ShiftBias(double delta) override {
    at::NoGradGuard no_grad;
    only_.bias[0].add_(delta);
  }
  void Open(double margin) override { SetAll(margin, 0, &only_); }
  int64_t FlopsPerRow() const override { return 2 * only_.weight.numel(); }

 private:
  std::string prefix_;
  ops::Matrix only_;
};

class NormMlp : public GateScorer {
 public:
  NormMlp(const Shape& shape, int64_t hidden, std::string prefix)
      : prefix_(std::move(prefix)), eps_(shape.rms_norm_eps) {
    first_.weight = at::zeros({hidden, shape.dim});
    first_.bias = at::zeros({hidden});
    norm_ = at::zeros({hidden});
    second_.weight = at::zeros({2, hidden});
    second_.bias = at::zeros({2});
  }
  at::Tensor Difference(const at::Tensor& x_ND) const override {
    const at::Tensor hidden = ops::Silu(ops::RmsNorm(ops::Linear(x_ND, first_), norm_, eps_));
    const at::Tensor logits_N2 = ops::Linear(hidden, second_);
    return logits_N2.select(1, 1) - logits_N2.select(1, 0);
  }
  void ForEachTensor(const TensorVisitor& visit) override {
    visit(prefix_ + "weight_predictor.0.weight", first_.weight);
    visit(prefix_ + "weight_predictor.0.bias", first_.bias);
    visit(prefix_ + "weight_predictor.norm.weight", norm_);
    visit(prefix_ + "weight_predictor.2.weight", second_.weight);
    visit(prefix_ + "weight_predictor.2.bias", second_.bias);
  }
  void Initialize() override {
    at::NoGradGuard no_grad;
    second_.bias.copy_(at::tensor({0.1f, 2.0f}));
  }
  void ShiftBias(double delta) override {
    at::NoGradGuard no_grad;
    second_.bias[1].add_(delta);
  }
  /// Its hidden layer is normed, so that drawn weights move no row far from the margin; and rows
  /// that differ a little from the start give the ratio controller something to tell apart.
  void Open(double margin) override {
    at::NoGradGuard no_grad;
    second_.bias.zero_();
    ShiftBias(margin);
  }
  int64_t FlopsPerRow() const override {
    return 2 * (first_.weight.numel() + second_.weight.numel());
  }

 private:
  std::string prefix_;
  double eps_;
  ops::Matrix first_, second_;
  at::Tensor norm_;
};

Bypass BypassNamed(const std::string& name) {
  if (name == "identity") return Bypass::kIdentity;
  return name == "window" ? Bypass::kWindow : Bypass::kValue;
}

class Gate : public Router {
 public:
  Gate(Site site, const RoutingConfig& config, const Shape& shape, const std::string& prefix)
      : Router(site),
        estimator_(config.Text("estimator")),
        temperature_(config.Number("temperature")),
        bypass_(BypassNamed(config.Text("bypass"))),
        window_{config.Int("window"), config.Int("sink")},
        write_all_(config.Text("kv") == "all"),
        key_gradient_(config.Flag("key_gradient")),
        soft_keys_(config.Flag("soft_keys")),
        reserved_(config.Int("reserved")),
        prefix_(prefix),
        control_(MakeControl(config, shape, prefix)) {
    if (config.Text("bypass") == "constant" && site == Site::kMixer) {
      constant_D_ = at::zeros({shape.dim});
    }
    if (config.Flag("value_scale") && site == Site::kMixer) scale_H_ = at::ones({shape.num_heads});
    const int64_t hidden = config.Int("hidden");
    if (!control_) {
      scorer_ = MakeScorer(config.Text("scorer"), shape,
                           hidden > 0 ? hidden : std::max<int64_t>(shape.dim / 2, 1), prefix);
    }
  }

  Plan Decide(const Taps& taps, const DecideArgs& args) const override {
    Plan plan;
    plan.bypass = bypass_;
    plan.window = window_;
    plan.write_all = write_all_;
    plan.bypass_D = constant_D_;
    plan.bypass_H = scale_H_;
    if (control_) {
      SetRows(Reserve(taps.stream, args.replay ? RoutedFlags(*args.replay)
                                               : control_->Rows(taps.stream, args.layer)),
              &plan);
      plan.scores_NC = OneHot(plan);
      return plan;
    }
    const at::Tensor difference_N = scorer_->Difference(taps.x_ND);
    // softmax over two logits, as the sigmoid of their difference and of its negative.
    plan.scores_NC = ops::Sigmoid(at::stack({difference_N, -difference_N}, 1));
    at::Tensor gate_N = plan.scores_NC.select(1, 0).contiguous();
    if (estimator_ == "gumbel_ste" && args.mode == Mode::kTrain) {
      const double t = args.knobs.temperature > 0 ? args.knobs.temperature : temperature_;
      gate_N = ops::Sigmoid((difference_N + LogisticNoise(taps.stream, args)) / t);
    }
    if (args.replay) {
      SetRows(RoutedFlags(*args.replay), &plan);
    } else {
      const float* p = ops::F32(gate_N);
      std::vector<uint8_t> routed(gate_N.size(0));
      for (size_t n = 0; n < routed.size(); ++n) routed[n] = p[n] > 0.5f;
      SetRows(Reserve(taps.stream, std::move(routed)), &plan);
    }
    Estimate(WithoutReserved(gate_N, taps.stream), args.mode, &plan);
    return plan;
  }

  void ForEachTensor(const TensorVisitor& visit) override {
    if (constant_D_.defined()) visit(prefix_ + "bypass_constant", constant_D_);
    if (scale_H_.defined()) visit(prefix_ + "bypass_scale", scale_H_);
    if (scorer_) scorer_->ForEachTensor(visit);
    if (control_) control_->ForEachTensor(visit);
  }
  void Initialize() override {
    if (scorer_) scorer_->Initialize();
  }
  bool ShiftBias(double delta) override {
    if (scorer_) scorer_->ShiftBias(delta);
    return scorer_ != nullptr;
  }
  bool Open(double margin) override {
    if (scorer_) scorer_->Open(margin);
    return scorer_ != nullptr;
  }
  void SetFrequencies(const std::vector<int64_t>& counts) override {
    if (control_) control_->SetFrequencies(counts);
  }
  int64_t FlopsPerRow() const override { return scorer_ ? scorer_->FlopsPerRow() : 0; }

 private:
  std::vector<uint8_t> Reserve(const Stream& stream, std::vector<uint8_t> routed) const {
    const int32_t* positions = ops::I32(stream.positions_N);
    for (size_t n = 0; n < routed.size() && reserved_ > 0; ++n) {
      if (positions[n] < reserved_) routed[n] = 1;
    }
    return routed;
  }

  /// Reserved rows have no choice, and so no gradient.
  at::Tensor WithoutReserved(const at::Tensor& gate_N, const Stream& stream) const {
    if (reserved_ == 0 || estimator_ == "prob_gate") return gate_N;
    return at::where(stream.positions_N.ge(reserved_), gate_N, at::ones({}));
  }

  /// The difference of two Gumbel variables per row, keyed by the row of the global batch.
  at::Tensor LogisticNoise(const Stream& stream, const DecideArgs& args) const {
    const Rng rng(args.draw.seed, RngPurpose::kRoute, args.draw.step,
                  static_cast<uint32_t>(args.layer) * 4 + static_cast<uint32_t>(site()));
    at::Tensor noise = at::empty({stream.num_rows()}, at::kFloat);
    for (int64_t n = 0; n < stream.num_rows(); ++n) {
      const double u =
          std::clamp(rng.Uniform(args.draw.first_row + stream.SourceRow(n)), 1e-12, 1 - 1e-12);
      noise.data_ptr<float>()[n] = static_cast<float>(std::log(u / (1 - u)));
    }
    return noise;
  }

  void Estimate(const at::Tensor& gate_N, Mode mode, Plan* plan) const {
    if (estimator_ == "prob_gate") {
      plan->gate_N = gate_N;
      plan->weight_N = at::where(FlagTensor(*plan).to(at::kBool), plan->scores_NC.select(1, 0),
                                 plan->scores_NC.select(1, 1));
    } else if (mode != Mode::kTrain) {
      return;  // hard: the way taken has weight 1
    } else if (estimator_ == "soft") {
      plan->gate_N = gate_N;
      plan->soft = true;
      plan->soft_keys = soft_keys_ && site() == Site::kMixer;
    } else {
      plan->gate_N = ops::StraightThrough(FlagTensor(*plan), gate_N);
      plan->counterfactual = true;
      plan->key_gradient = key_gradient_ && site() != Site::kFfn && !write_all_;
    }
  }

  std::string estimator_;
  double temperature_;
  Bypass bypass_;
  ops::WindowRule window_;
  bool write_all_, key_gradient_, soft_keys_;
  int64_t reserved_;
  at::Tensor constant_D_;  // undefined unless bypass is "constant"
  at::Tensor scale_H_;     // undefined unless value_scale
  std::string prefix_;
  std::unique_ptr<Control> control_;
  std::unique_ptr<GateScorer> scorer_;  // null with a control
};

}  // namespace

std::unique_ptr<GateScorer> MakeScorer(const std::string& kind, const Shape& shape, int64_t hidden,
                                       const std::string& prefix) {
  if (kind == "linear") return std::make_unique<LinearScorer>(shape.dim, prefix);
  if (kind == "norm_mlp") return std::make_unique<NormMlp>(shape, hidden, prefix);
  return std::make_unique<Mlp>(shape.dim, hidden, prefix);
}

std::unique_ptr<Router> MakeGate(Site site, const RoutingConfig& config, const Shape& shape,
                                 const std::string& prefix) {
  return std::make_unique<Gate>(site, config, shape, prefix);
}

}  // namespace detour::routing
