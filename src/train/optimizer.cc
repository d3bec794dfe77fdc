#include "train/optimizer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/threads.h"
#include "ops/linear.h"

namespace detour::train {

namespace {

/// In chunks of one size, so that the sum does not depend on threads.
double SquaredNorm(const at::Tensor& t) {
  constexpr int64_t kChunk = 1 << 14;
  const float* x = ops::F32(t);
  const int64_t n = t.numel();
  std::vector<double> sums((n + kChunk - 1) / kChunk);
  ParallelFor(0, std::ssize(sums), 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t last = std::min(n, (c + 1) * kChunk);
      for (int64_t i = c * kChunk; i < last; ++i) sums[c] += double{x[i]} * x[i];
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

AdamW::AdamW(const ForEachTrained& for_each, const AdamWOptions& options) : options_(options) {
  for_each([&](const std::string& name, at::Tensor& weight) {
    weight.requires_grad_(true);
    params_.push_back(
        {name, weight, at::zeros_like(weight), at::zeros_like(weight), at::zeros({}, at::kFloat)});
  });
}

AdamW::AdamW(model::Model& model, const AdamWOptions& options)
    : AdamW([&](const routing::TensorVisitor& visit) { ForEachTensor(model, visit); }, options) {}

int64_t AdamW::CountParameters() const {
  int64_t count = 0;
  for (const Param& p : params_) count += p.weight.numel();
  return count;
}

void AdamW::ZeroGrad() {
  for (Param& p : params_) p.weight.mutable_grad() = at::Tensor();
}

double AdamW::ClipGradNorm(double max_norm) {
  std::vector<at::Tensor> grads;
  double sum = 0;
  for (Param& p : params_) {
    if (!p.weight.grad().defined()) continue;
    grads.push_back(p.weight.grad());
    sum += SquaredNorm(grads.back().contiguous());
  }
  const double norm = std::sqrt(sum);
  // 1e-6 as in torch.nn.utils.clip_grad_norm_.
  const double scale = max_norm / (norm + 1e-6);
  if (max_norm > 0 && scale < 1) {
    for (at::Tensor& grad : grads) grad.mul_(scale);
  }
  return norm;
}

void AdamW::Step(double lr) {
  const at::NoGradGuard no_grad;
  for (const bool decay : {true, false}) {
    std::vector<at::Tensor> weights, grads, exp_avgs, exp_avg_sqs, steps;
    for (Param& p : params_) {
      if ((p.weight.dim() >= 2) != decay || !p.weight.grad().defined()) continue;
      weights.push_back(p.weight);
      grads.push_back(p.weight.grad());
      exp_avgs.push_back(p.exp_avg);
      exp_avg_sqs.push_back(p.exp_avg_sq);
      p.step.add_(1);
      steps.push_back(p.step);
    }
    if (weights.empty()) continue;
    at::_fused_adamw_(weights, grads, exp_avgs, exp_avg_sqs, /*max_exp_avg_sqs=*/{}, steps, lr,
                      options_.beta1, options_.beta2, decay ? options_.weight_decay : 0.0,
                      options_.eps, /*amsgrad=*/false, /*maximize=*/false);
    // The packed copies of the weights follow the version.
    for (at::Tensor& w : weights) torch::autograd::impl::bump_version(w);
  }
}

void AdamW::ForEachState(const routing::TensorVisitor& visit) {
  for (Param& p : params_) {
    visit(p.name + ".exp_avg", p.exp_avg);
    visit(p.name + ".exp_avg_sq", p.exp_avg_sq);
    visit(p.name + ".step", p.step);
  }
}

}  // namespace detour::train
