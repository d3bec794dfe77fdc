// Kernels on rows and elements: norm, rotary embedding, activations, residual sums, gather.
// clang-format off
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rows.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "kernels/math-inl.h"
#include "kernels/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

void RmsNormRow(const float* x, int64_t dim, const float* w, float eps, float* y, float* inv_rms) {
  Lanes sum(0.0f);
  SweepLanes(dim, sum, [&](const auto& io, int64_t i, V& lane) HWY_ATTR {
    const V x_i = io.Load(x + i);
    lane = hn::MulAdd(x_i, x_i, lane);
  });
  const float inv = 1.0f / std::sqrt(SumLanes(sum) / static_cast<float>(dim) + eps);
  const V inv_v = hn::Set(d, inv);
  Sweep(dim, [&](const auto& io, int64_t i) HWY_ATTR {
    io.Store(hn::Mul(hn::Mul(io.Load(x + i), inv_v), io.Load(w + i)), y + i);
  });
  if (inv_rms) *inv_rms = inv;
}

/// dx of one row; dw_D += this row's part.
void RmsNormBackwardRow(const float* dy, const float* x, const float* w, float inv, int64_t dim,
                        float* dx, float* dw) {
  Lanes sum(0.0f);
  SweepLanes(dim, sum, [&](const auto& io, int64_t i, V& lane) HWY_ATTR {
    lane = hn::MulAdd(hn::Mul(io.Load(dy + i), io.Load(w + i)), io.Load(x + i), lane);
  });
  const V inv_v = hn::Set(d, inv);
  const V c = hn::Set(d, inv * inv * SumLanes(sum) / static_cast<float>(dim));
  Sweep(dim, [&](const auto& io, int64_t i) HWY_ATTR {
    const V dy_i = io.Load(dy + i), x_i = io.Load(x + i);
    io.Store(hn::MulAdd(dy_i, hn::Mul(x_i, inv_v), io.Load(dw + i)), dw + i);
    io.Store(hn::Mul(inv_v, hn::NegMulAdd(x_i, c, hn::Mul(dy_i, io.Load(w + i)))), dx + i);
  });
}

/// One head of one row; cos and sin of its position, K/2 each.
void RopeHead(const float* x, int64_t half, const float* cos_sin, bool inverse, float* y) {
  Sweep(half, [&](const auto& io, int64_t i) HWY_ATTR {
    const V a = io.Load(x + i), b = io.Load(x + half + i), c = io.Load(cos_sin + i);
    const V table = io.Load(cos_sin + half + i);
    const V s = inverse ? hn::Neg(table) : table;
    io.Store(hn::MulSub(a, c, hn::Mul(b, s)), y + i);
    io.Store(hn::MulAdd(b, c, hn::Mul(a, s)), y + half + i);
  });
}

HWY_INLINE V OnePlusExpNeg(V x) { return hn::Add(hn::Set(d, 1.0f), Exp(hn::Neg(x))); }
HWY_INLINE V SigmoidOf(V x) { return hn::Div(hn::Set(d, 1.0f), OnePlusExpNeg(x)); }
/// σ(x)(1 + x(1 − σ(x))), given s = σ(x).
HWY_INLINE V SiluSlope(V x, V s) {
  const V one = hn::Set(d, 1.0f);
  return hn::Mul(s, hn::MulAdd(x, hn::Sub(one, s), one));
}

void SiluMulRange(const float* g, const float* u, int64_t n, float* h) {
  Sweep(n, [&](const auto& io, int64_t i) HWY_ATTR {
    const V gate = io.Load(g + i);
    io.Store(hn::Mul(hn::Div(gate, OnePlusExpNeg(gate)), io.Load(u + i)), h + i);
  });
}

void SiluMulBackwardRange(const float* dh, const float* g, const float* u, int64_t n, float* dg,
                          float* du) {
  Sweep(n, [&](const auto& io, int64_t i) HWY_ATTR {
    const V dh_i = io.Load(dh + i), gate = io.Load(g + i), up = io.Load(u + i);
    const V s = SigmoidOf(gate);
    io.Store(hn::Mul(hn::Mul(dh_i, up), SiluSlope(gate, s)), dg + i);
    io.Store(hn::Mul(dh_i, hn::Mul(gate, s)), du + i);
  });
}

void SiluRange(const float* x, int64_t n, float* y) {
  Sweep(n, [&](const auto& io, int64_t i) HWY_ATTR {
    const V x_i = io.Load(x + i);
    io.Store(hn::Div(x_i, OnePlusExpNeg(x_i)), y + i);
  });
}

void SiluBackwardRange(const float* dy, const float* x, int64_t n, float* dx) {
  Sweep(n, [&](const auto& io, int64_t i) HWY_ATTR {
    const V x_i = io.Load(x + i);
    io.Store(hn::Mul(io.Load(dy + i), SiluSlope(x_i, SigmoidOf(x_i))), dx + i);
  });
}

void SigmoidRange(const float* x, int64_t n, float* y) {
  Sweep(n, [&](const auto& io, int64_t i) HWY_ATTR { io.Store(SigmoidOf(io.Load(x + i)), y + i); });
}

void ExpRange(const float* x, int64_t n, float* y) {
  Sweep(n, [&](const auto& io, int64_t i) HWY_ATTR { io.Store(Exp(io.Load(x + i)), y + i); });
}

void AddRow(const float* x, const float* f, int64_t dim, float* y) {
  Sweep(dim, [&](const auto& io, int64_t i)
                 HWY_ATTR { io.Store(hn::Add(io.Load(x + i), io.Load(f + i)), y + i); });
}

void AddScaledRow(const float* x, const float* f, float weight, int64_t dim, float* y) {
  const V weight_v = hn::Set(d, weight);
  Sweep(dim, [&](const auto& io, int64_t i) HWY_ATTR {
    io.Store(hn::MulAdd(weight_v, io.Load(f + i), io.Load(x + i)), y + i);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace detour::kernels {
namespace {

constexpr int64_t kGrainElements = 1 << 14;  // below, waking a thread costs more than it saves
constexpr int64_t kGradientRows = 64;        // rows summed into one partial dw

int64_t RowGrain(int64_t dim) { return std::max<int64_t>(1, kGrainElements / dim); }

/// fn(row) for each row, in parallel.
template <class Fn>
void ForRows(int64_t num_rows, int64_t dim, const Fn& fn) {
  ParallelFor(0, num_rows, RowGrain(dim), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) fn(r);
  });
}

/// fn(begin, length) on ranges of n elements, in parallel.
template <class Fn>
void ForElements(int64_t n, const Fn& fn) {
  ParallelFor(0, n, kGrainElements, [&](int64_t begin, int64_t end) { fn(begin, end - begin); });
}

}  // namespace

void RmsNorm(const float* x, int64_t num_rows, int64_t dim, const float* w, float eps, float* y,
             float* inv_rms_N) {
  const auto run = DETOUR_DISPATCH(RmsNormRow);
  ForRows(num_rows, dim, [&](int64_t r) {
    run(x + r * dim, dim, w, eps, y + r * dim, inv_rms_N ? inv_rms_N + r : nullptr);
  });
}

void RmsNormBackward(const float* dy, const float* x, const float* w, const float* inv_rms_N,
                     int64_t num_rows, int64_t dim, float* dx, float* dw) {
  const auto run = DETOUR_DISPATCH(RmsNormBackwardRow);
  const int64_t num_chunks = (num_rows + kGradientRows - 1) / kGradientRows;
  std::vector<float> partial(num_chunks * dim, 0.0f);
  ParallelFor(0, num_chunks, std::max<int64_t>(1, RowGrain(dim) / kGradientRows),
              [&](int64_t begin, int64_t end) {
                const int64_t row_end = std::min(num_rows, end * kGradientRows);
                for (int64_t r = begin * kGradientRows; r < row_end; ++r) {
                  run(dy + r * dim, x + r * dim, w, inv_rms_N[r], dim, dx + r * dim,
                      partial.data() + r / kGradientRows * dim);
                }
              });
  std::fill_n(dw, dim, 0.0f);
  for (int64_t c = 0; c < num_chunks; ++c) {
    for (int64_t i = 0; i < dim; ++i) dw[i] += partial[c * dim + i];
  }
}

void Rope(const float* x, int64_t ldx, int64_t num_rows, int64_t num_heads, int64_t head_dim,
          const int32_t* positions, const float* cos_sin, bool inverse, float* y, int64_t ldy) {
  DETOUR_CHECK(head_dim >= 2 && head_dim % 2 == 0, "head_dim {}", head_dim);
  const auto run = DETOUR_DISPATCH(RopeHead);
  ForRows(num_rows, num_heads * head_dim, [&](int64_t r) {
    for (int64_t h = 0; h < num_heads; ++h) {
      run(x + r * ldx + h * head_dim, head_dim / 2, cos_sin + positions[r] * head_dim, inverse,
          y + r * ldy + h * head_dim);
    }
  });
}

void SiluMul(const float* g, const float* u, int64_t n, float* h) {
  const auto run = DETOUR_DISPATCH(SiluMulRange);
  ForElements(n, [&](int64_t i, int64_t size) { run(g + i, u + i, size, h + i); });
}

void SiluMulBackward(const float* dh, const float* g, const float* u, int64_t n, float* dg,
                     float* du) {
  const auto run = DETOUR_DISPATCH(SiluMulBackwardRange);
  ForElements(n, [&](int64_t i, int64_t size) { run(dh + i, g + i, u + i, size, dg + i, du + i); });
}

void Silu(const float* x, int64_t n, float* y) {
  const auto run = DETOUR_DISPATCH(SiluRange);
  ForElements(n, [&](int64_t i, int64_t size) { run(x + i, size, y + i); });
}

void SiluBackward(const float* dy, const float* x, int64_t n, float* dx) {
  const auto run = DETOUR_DISPATCH(SiluBackwardRange);
  ForElements(n, [&](int64_t i, int64_t size) { run(dy + i, x + i, size, dx + i); });
}

void Sigmoid(const float* x, int64_t n, float* y) {
  const auto run = DETOUR_DISPATCH(SigmoidRange);
  ForElements(n, [&](int64_t i, int64_t size) { run(x + i, size, y + i); });
}

void Exp(const float* x, int64_t n, float* y) {
  const auto run = DETOUR_DISPATCH(ExpRange);
  ForElements(n, [&](int64_t i, int64_t size) { run(x + i, size, y + i); });
}

void AddScaledRows(const float* x, const float* f, const float* weight_N, int64_t num_rows,
                   int64_t dim, float* y) {
  const auto add = DETOUR_DISPATCH(AddRow);
  const auto add_scaled = DETOUR_DISPATCH(AddScaledRow);
  ForRows(num_rows, dim, [&](int64_t r) {
    const int64_t i = r * dim;
    if (weight_N) {
      add_scaled(x + i, f + i, weight_N[r], dim, y + i);
    } else {
      add(x + i, f + i, dim, y + i);
    }
  });
}

void GatherRows(const float* x, int64_t ldx, const int32_t* rows, int64_t num_rows, int64_t dim,
                float* y, int64_t ldy) {
  ForRows(num_rows, dim,
          [&](int64_t r) { std::memcpy(y + r * ldy, x + rows[r] * ldx, dim * sizeof(float)); });
}

void ScatterRows(const float* x, int64_t ldx, const int32_t* rows, int64_t num_rows, int64_t dim,
                 float* y, int64_t ldy) {
  ForRows(num_rows, dim,
          [&](int64_t r) { std::memcpy(y + rows[r] * ldy, x + r * ldx, dim * sizeof(float)); });
}

void RepeatKvRows(const float* v, int64_t ldv, const int32_t* rows, int64_t num_rows,
                  int64_t num_kv_heads, int64_t num_heads, int64_t head_dim, float* y,
                  int64_t ldy) {
  DETOUR_CHECK(num_kv_heads >= 1 && num_heads % num_kv_heads == 0, "{} heads of {} kv heads",
               num_heads, num_kv_heads);
  const int64_t group = num_heads / num_kv_heads;
  ForRows(num_rows, num_heads * head_dim, [&](int64_t r) {
    for (int64_t h = 0; h < num_heads; ++h) {
      std::memcpy(y + rows[r] * ldy + h * head_dim, v + rows[r] * ldv + h / group * head_dim,
                  head_dim * sizeof(float));
    }
  });
}

}  // namespace detour::kernels
#endif  // HWY_ONCE
