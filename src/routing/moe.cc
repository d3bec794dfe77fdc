#include "routing/moe.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/rng.h"
#include "ops/linear.h"
#include "ops/rows.h"
#include "routing/controls.h"

namespace detour::routing {

std::vector<Option> MoeOptions() {
  std::vector<Option> options = {
      IntOption("experts", 8, 1, 4096, "number of experts"),
      IntOption("top_k", 2, 1, 64, "experts of a token"),
      FlagOption("normalize", true, "weights of the chosen experts sum to 1 (Mixtral)"),
      NumberOption("capacity_factor", 0, 0, 1e3,
                   "rows of an expert in training, over an even share; 0: no limit"),
      NumberOption("jitter", 0, 0, 0.5, "the router's input in training is scaled by 1 ± this"),
      NumberOption("aux_loss_coeff", 0.01, 0, 1e3, "weight of the load-balance loss"),
      NumberOption("z_loss_coeff", 0, 0, 1e3, "weight of the squared log-sum-exp (ST-MoE: 1e-3)"),
      NumberOption("bias_rate", 0, 0, 1, "step of the bias that balances loads without a loss"),
      IntOption("expert_size", 0, 0, 1 << 19, "hidden width of an expert; 0: the dense MLP's"),
      FlagOption("shared_expert", false, "an MLP beside the experts that every token takes"),
      IntOption("shared_size", 0, 0, 1 << 19, "its hidden width; 0: the dense MLP's"),
      FlagOption("shared_gate", false, "its answer is weighed by a sigmoid of the token (Qwen)")};
  for (Option& o : ControlOptions()) options.push_back(std::move(o));
  return options;
}

void CheckMoe(const RoutingConfig& config, std::vector<std::string>* faults) {
  if (config.Int("top_k") > config.Int("experts")) {
    faults->push_back(fmt::format("top_k: expected at most the number of experts {}, got {}",
                                  config.Int("experts"), config.Int("top_k")));
  }
  if (!config.Flag("shared_expert") &&
      (config.Flag("shared_gate") || config.Int("shared_size") > 0)) {
    faults->push_back("shared_size, shared_gate: expected shared_expert with them");
  }
}

namespace {

class MoeRouter : public Router {
 public:
  MoeRouter(const RoutingConfig& config, const Shape& shape)
      : Router(Site::kFfn),
        experts_(config.Int("experts")),
        top_k_(config.Int("top_k")),
        normalize_(config.Flag("normalize")),
        capacity_factor_(config.Number("capacity_factor")),
        jitter_(config.Number("jitter")),
        z_loss_coeff_(config.Number("z_loss_coeff")),
        bias_rate_(config.Number("bias_rate")),
        control_(MakeControl(config, shape, "block_sparse_moe.")) {
    if (control_) return;
    gate_.weight = at::zeros({experts_, shape.dim});
    if (bias_rate_ > 0) bias_E_ = at::zeros({experts_});
  }

  Plan Decide(const Taps& taps, const DecideArgs& args) const override {
    const int64_t num_rows = taps.stream.num_rows();
    Plan plan;
    plan.num_rows = num_rows;
    plan.experts.resize(experts_);
    plan.choices.assign(experts_, 0);
    const at::Tensor logits_NE = control_ ? ControlLogits(taps.stream, args.layer)
                                          : ops::Linear(Jittered(taps, args), gate_);
    plan.scores_NC = ops::Softmax(logits_NE);
    std::vector<std::vector<int32_t>> chosen(experts_);  // rows, ascending
    if (args.replay) {
      for (int64_t e = 0; e < experts_; ++e) {
        const at::Tensor& rows = args.replay->experts[e].rows;
        chosen[e].assign(ops::I32(rows), ops::I32(rows) + rows.size(0));
        plan.choices[e] = rows.size(0);
      }
    } else {
      Choose(plan.scores_NC, &chosen, &plan.choices);
      const auto capacity = static_cast<size_t>(
          std::ceil(capacity_factor_ * static_cast<double>(num_rows * top_k_) / experts_));
      for (auto& rows : chosen) {
        if (args.mode == Mode::kTrain && capacity_factor_ > 0 && rows.size() > capacity) {
          rows.resize(capacity);
        }
      }
    }
    Weigh(chosen, &plan);
    if (args.mode == Mode::kTrain && z_loss_coeff_ > 0 && !control_) {
      plan.penalty = at::logsumexp(logits_NE, 1).square().sum() * z_loss_coeff_;
    }
    return plan;
  }

  void ForEachTensor(const TensorVisitor& visit) override {
    if (control_) return control_->ForEachTensor(visit);
    visit("block_sparse_moe.gate.weight", gate_.weight);
    if (bias_E_.defined()) visit("block_sparse_moe.expert_bias", bias_E_);
  }
  void Balance(const std::vector<int64_t>& choices) override {
    if (!bias_E_.defined() || choices.empty()) return;
    const at::NoGradGuard no_grad;
    const double mean =
        static_cast<double>(std::accumulate(choices.begin(), choices.end(), int64_t{0})) /
        static_cast<double>(experts_);
    for (int64_t e = 0; e < experts_; ++e) {
      const double gap = mean - static_cast<double>(choices[e]);
      bias_E_[e].add_(gap > 0 ? bias_rate_ : gap < 0 ? -bias_rate_ : 0.0);
    }
  }
  void SetFrequencies(const std::vector<int64_t>& counts) override {
    if (control_) control_->SetFrequencies(counts);
  }
  int64_t FlopsPerRow() const override { return control_ ? 0 : 2 * gate_.weight.numel(); }
  int64_t num_experts() const override { return experts_; }

 private:
  at::Tensor Jittered(const Taps& taps, const DecideArgs& args) const {
    if (args.mode != Mode::kTrain || jitter_ == 0) return taps.h_ND;
    const int64_t dim = taps.h_ND.size(1);
    const Rng rng(args.draw.seed, RngPurpose::kRoute, args.draw.step,
                  static_cast<uint32_t>(args.layer));
    at::Tensor scale = at::empty_like(taps.h_ND);
    float* data = ops::F32(scale);
    for (int64_t n = 0; n < scale.size(0); ++n) {
      const int64_t row = args.draw.first_row + taps.stream.SourceRow(n);
      for (int64_t i = 0; i < dim; ++i) {
        data[n * dim + i] = static_cast<float>(1 + jitter_ * (2 * rng.Uniform(row * dim + i) - 1));
      }
    }
    return taps.h_ND * scale;
  }

  /// A control's expert, and the ones after it, stand out.
  at::Tensor ControlLogits(const Stream& stream, int32_t layer) const {
    at::Tensor logits = at::full({stream.num_rows(), experts_}, -20.0f);
    for (int64_t n = 0; n < stream.num_rows(); ++n) {
      const int64_t first = control_->Choice(stream, layer, n, experts_);
      for (int64_t k = 0; k < top_k_; ++k) {
        logits.data_ptr<float>()[n * experts_ + (first + k) % experts_] = 20.0f;
      }
    }
    return logits;
  }

  /// The top_k experts of each row by score + bias; ties: the lower expert.
  void Choose(const at::Tensor& scores_NE, std::vector<std::vector<int32_t>>* chosen,
              std::vector<int64_t>* choices) const {
    const at::Tensor values = scores_NE.contiguous();
    const float* scores = ops::F32(values);
    const float* bias = bias_E_.defined() ? ops::F32(bias_E_) : nullptr;
    std::vector<int32_t> order(experts_);
    for (int64_t n = 0; n < values.size(0); ++n) {
      const float* s = scores + n * experts_;
      const auto value = [&](int32_t e) { return bias ? s[e] + bias[e] : s[e]; };
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(
          order.begin(), order.begin() + top_k_, order.end(),
          [&](int32_t a, int32_t b) { return value(a) != value(b) ? value(a) > value(b) : a < b; });
      for (int64_t k = 0; k < top_k_; ++k) {
        (*chosen)[order[k]].push_back(static_cast<int32_t>(n));
        ++(*choices)[order[k]];
      }
    }
  }

  /// Weights of the chosen: their probabilities, or these over their sum.
  void Weigh(const std::vector<std::vector<int32_t>>& chosen, Plan* plan) const {
    at::Tensor mask = at::zeros_like(plan->scores_NC);
    for (int64_t e = 0; e < experts_; ++e) {
      plan->experts[e].rows = RowTensor(chosen[e]);
      for (int32_t row : chosen[e]) mask.data_ptr<float>()[row * experts_ + e] = 1;
    }
    at::Tensor weights_NE = plan->scores_NC;
    if (normalize_) {
      // Over the chosen only; a row whose experts were all full has none to weigh.
      const at::Tensor kept = plan->scores_NC * mask;
      // Added up expert by expert: a library's sum may take another order for another shape.
      at::Tensor sum_N = kept.select(1, 0);
      for (int64_t e = 1; e < experts_; ++e) sum_N = sum_N + kept.select(1, e);
      weights_NE = kept / sum_N.clamp_min(1e-30).unsqueeze(1);
    }
    for (int64_t e = 0; e < experts_; ++e) {
      plan->experts[e].weight =
          weights_NE.select(1, e).index_select(0, plan->experts[e].rows).contiguous();
    }
  }

  int64_t experts_, top_k_;
  bool normalize_;
  double capacity_factor_, jitter_, z_loss_coeff_, bias_rate_;
  std::unique_ptr<Control> control_;
  ops::Matrix gate_;
  at::Tensor bias_E_;
};

}  // namespace

std::vector<std::unique_ptr<Router>> MakeMoe(const RoutingConfig& config, const Shape& shape,
                                             int32_t) {
  return OneRouter(std::make_unique<MoeRouter>(config, shape));
}

}  // namespace detour::routing
