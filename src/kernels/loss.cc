// Cross-entropy over rows of logits.
// clang-format off
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/loss.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "kernels/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

/// The loss of one row with target >= 0; logits become its gradient if `write_gradient`.
float CrossEntropyRow(float* logits, int64_t vocab, int32_t target, bool write_gradient,
                      float gradient_scale) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float target_logit = logits[target];
  Lanes maxima(-infinity);
  SweepLanes(vocab, maxima, [&](const auto& io, int64_t i, V& lane) HWY_ATTR {
    lane = hn::Max(lane, io.OrElse(io.Load(logits + i), -infinity));
  });
  const float max = MaxLanes(maxima);
  const V max_v = hn::Set(d, max);
  Lanes sums(0.0f);
  SweepLanes(vocab, sums, [&](const auto& io, int64_t i, V& lane) HWY_ATTR {
    const V p = Exp(hn::Sub(io.Load(logits + i), max_v));
    if (write_gradient) io.Store(p, logits + i);
    lane = hn::Add(lane, io.OrElse(p, 0.0f));
  });
  const float sum = SumLanes(sums);
  if (write_gradient) {
    const float p_target = logits[target] / sum;
    const V sum_v = hn::Set(d, sum), scale = hn::Set(d, gradient_scale);
    Sweep(vocab, [&](const auto& io, int64_t i) HWY_ATTR {
      io.Store(hn::Mul(hn::Div(io.Load(logits + i), sum_v), scale), logits + i);
    });
    logits[target] = (p_target - 1.0f) * gradient_scale;
  }
  return static_cast<float>(std::log(static_cast<double>(sum)) + max - target_logit);
}

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace detour::kernels {

void CrossEntropyRows(float* logits, int64_t num_rows, int64_t vocab, const int32_t* targets,
                      bool write_gradient, float gradient_scale, float* loss_N) {
  const auto run = DETOUR_DISPATCH(CrossEntropyRow);
  const int64_t grain = std::max<int64_t>(1, (1 << 13) / std::max<int64_t>(1, vocab));
  ParallelFor(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = logits + r * vocab;
      DETOUR_CHECK(targets[r] < vocab, "target {} of row {}, vocab {}", targets[r], r, vocab);
      if (targets[r] >= 0) {
        loss_N[r] = run(row, vocab, targets[r], write_gradient, gradient_scale);
      } else {
        loss_N[r] = 0;
        if (write_gradient) std::fill_n(row, vocab, 0.0f);
      }
    }
  });
}

}  // namespace detour::kernels
#endif  // HWY_ONCE
