#include "train/distill.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "ops/loss.h"

namespace detour::train {
namespace {

using at::Tensor;

struct Case {
  double weight, temperature;
};

class Distillation : public ::testing::TestWithParam<Case> {};

/// Against libtorch's own softmax, in double, with its own gradients.
TEST_P(Distillation, LossAndGradientsAreThoseOfTorch) {
  const auto [weight, temperature] = GetParam();
  constexpr int64_t kRows = 150, kVocab = 70000;  // several chunks of rows
  at::manual_seed(1);
  const Tensor h = at::randn({kRows, 12}).requires_grad_();
  ops::Matrix head;
  head.weight = at::randn({kVocab, 12}).requires_grad_();
  ops::Matrix teacher_head;
  teacher_head.weight = at::randn({kVocab, 20}) * 0.5;
  const Tensor teacher_h = at::randn({kRows, 20});
  Tensor targets = at::randint(0, kVocab, {kRows}, at::kInt);
  targets.slice(0, 3, 9).fill_(-1);
  const double scale = 1.0 / (kRows - 6);
  Tensor losses, divergence;
  const Tensor loss = ops::LinearDistillation(h, head, targets, scale,
                                              {teacher_h, &teacher_head, weight, temperature},
                                              &losses, &divergence);
  (loss * 1.5).backward();

  const Tensor h64 = h.detach().to(at::kDouble).requires_grad_();
  const Tensor w64 = head.weight.detach().to(at::kDouble).requires_grad_();
  const Tensor logits = at::matmul(h64, w64.t());
  const Tensor taught =
      at::matmul(teacher_h.to(at::kDouble), teacher_head.weight.to(at::kDouble).t());
  const Tensor counts = (targets >= 0).to(at::kDouble);
  const Tensor ce = -at::log_softmax(logits, 1)
                         .gather(1, targets.clamp_min(0).to(at::kLong).unsqueeze(1))
                         .squeeze(1) *
                    counts;
  const Tensor log_p = at::log_softmax(taught / temperature, 1);
  const Tensor kl =
      (log_p.exp() * (log_p - at::log_softmax(logits / temperature, 1))).sum(1) * counts;
  const Tensor expected =
      (ce * (1 - weight) + kl * (weight * temperature * temperature)).sum() * scale;
  (expected * 1.5).backward();

  const auto near = [](const Tensor& got, const Tensor& want, double tolerance) {
    return (got.to(at::kDouble) - want).norm().item<double>() <=
           tolerance * want.norm().item<double>();
  };
  EXPECT_NEAR(loss.item<double>(), expected.item<double>(), 1e-5 * expected.item<double>());
  EXPECT_TRUE(near(losses, ce, 1e-5));
  EXPECT_TRUE(near(divergence, kl, 1e-5));
  EXPECT_TRUE(near(h.grad(), h64.grad(), 1e-4));
  EXPECT_TRUE(near(head.weight.grad(), w64.grad(), 1e-4));
}

INSTANTIATE_TEST_SUITE_P(Weights, Distillation,
                         ::testing::Values(Case{1, 1}, Case{0.3, 2}, Case{0, 1}));

}  // namespace
}  // namespace detour::train
