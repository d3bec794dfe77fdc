#include "routing/dtrnet.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "ops/linear.h"
#include "ops/rows.h"

namespace detour::routing {

namespace {

class DtrnetRouter : public Router {
 public:
  explicit DtrnetRouter(int64_t dim) {
    const int64_t hidden = std::max<int64_t>(dim / 2, 1);
    first_.weight = at::zeros({hidden, dim});
    first_.bias = at::zeros({hidden});
    second_.weight = at::zeros({2, hidden});
    second_.bias = at::zeros({2});
  }

  Plan Decide(const at::Tensor& x_ND, Mode mode, const Plan* replay) const override {
    const at::Tensor logits_N2 = ops::Linear(ops::Silu(ops::Linear(x_ND, first_)), second_);
    // softmax over two logits, as the sigmoid of their difference and of its negative.
    const at::Tensor difference_N = logits_N2.select(1, 0) - logits_N2.select(1, 1);
    Plan plan;
    plan.scores_N2 = ops::Sigmoid(at::stack({difference_N, -difference_N}, 1));
    const int64_t num_rows = x_ND.size(0);
    if (replay) {
      SetRows(RoutedFlags(*replay, num_rows), &plan);
    } else {
      std::vector<uint8_t> routed(num_rows);
      const float* p = ops::F32(plan.scores_N2);
      for (int64_t n = 0; n < num_rows; ++n) routed[n] = p[2 * n] > 0.5f;
      SetRows(routed, &plan);
    }
    if (mode == Mode::kTrain) plan.budget_sum = plan.scores_N2.select(1, 0).sum();
    return plan;
  }

  void ForEachTensor(const TensorVisitor& visit) override {
    visit("router.weight_predictor.0.weight", first_.weight);
    visit("router.weight_predictor.0.bias", first_.bias);
    visit("router.weight_predictor.2.weight", second_.weight);
    visit("router.weight_predictor.2.bias", second_.bias);
  }

  void ShiftBias(double delta) override {
    at::NoGradGuard no_grad;
    second_.bias[0].add_(delta);
  }

  int64_t FlopsPerRow() const override {
    return 2 * (first_.weight.numel() + second_.weight.numel());
  }

  int64_t NumParameters() const override {
    return first_.weight.numel() + first_.bias.numel() + second_.weight.numel() + 2;
  }

 private:
  ops::Matrix first_, second_;
};

}  // namespace

std::unique_ptr<Router> MakeDtrnetRouter(const RoutingConfig&, int64_t dim, int32_t) {
  return std::make_unique<DtrnetRouter>(dim);
}

}  // namespace detour::routing
