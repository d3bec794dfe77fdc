// Weights rounded to blocks, and rows turned into the columns of a panel.
// clang-format off
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantize.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <bit>
#include <cmath>

#include "core/error.h"
#include "core/half.h"
#include "kernels/gemm.h"
#include "kernels/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

void RangeOf(const float* w, float* low, float* high) {
  V min = hn::LoadU(d, w), max = min, finite = hn::Zero(d);
  for (int64_t i = 0; i < kQuantBlock; i += kLanes) {
    const V w_i = hn::LoadU(d, w + i);
    min = hn::Min(min, w_i);
    max = hn::Max(max, w_i);
    finite = hn::MulAdd(w_i, hn::Zero(d), finite);  // an infinity or a NaN makes it NaN
  }
  // + 0: of two zeros the positive one, on every target.
  *low = hn::GetLane(hn::MinOfLanes(d, min)) + 0.0f + hn::GetLane(hn::SumOfLanes(d, finite));
  *high = hn::GetLane(hn::MaxOfLanes(d, max)) + 0.0f;
}

/// q_i = (w_i − min) · inverse, to nearest (halves away from 0) or floor(· + from), within
/// [least, most].
template <bool kNearest>
void RoundAll(const float* w, float min, float inverse, float from, float least, float most,
              int8_t* q) {
  const hn::Rebind<int8_t, D> d8;
  for (int64_t i = 0; i < kQuantBlock; i += kLanes) {
    V x = hn::Mul(hn::Sub(hn::LoadU(d, w + i), hn::Set(d, min)), hn::Set(d, inverse));
    if constexpr (kNearest) {
      const V whole = hn::Trunc(x);
      const auto away = hn::Ge(hn::Abs(hn::Sub(x, whole)), hn::Set(d, 0.5f));
      x = hn::Add(whole, hn::IfThenElseZero(away, hn::CopySign(hn::Set(d, 1.0f), x)));
    } else {
      x = hn::Floor(hn::Add(x, hn::Set(d, from)));
    }
    x = hn::Min(hn::Max(x, hn::Set(d, least)), hn::Set(d, most));
    hn::StoreU(hn::DemoteTo(d8, hn::ConvertTo(hn::RebindToSigned<D>(), x)), d8, q + i);
  }
}

void RoundBlock(WeightFormat format, const float* w, float min, float inverse, int8_t* q) {
  if (format == WeightFormat::kQ8) return RoundAll<true>(w, min, inverse, 0, -127, 127, q);
  RoundAll<false>(w, min, inverse, format == WeightFormat::kQ4 ? 8.5f : 0.5f, 0, 15, q);
}

/// to[i][m] = w[m][i], in squares of 4 × 4; what does not fill them one by one.
void Transpose(const float* w, int64_t ldw, int64_t rows, int64_t columns, float* to, int64_t ldt) {
  const hn::CappedTag<float, 4> d4;
  const hn::Repartition<uint64_t, decltype(d4)> d64;
  const int64_t square_rows = rows / 4 * 4, square_columns = columns / 4 * 4;
  for (int64_t m = 0; m < square_rows; m += 4) {
    for (int64_t i = 0; i < square_columns; i += 4) {
      const float* from = w + m * ldw + i;
      const auto a = hn::LoadU(d4, from), b = hn::LoadU(d4, from + ldw);
      const auto c = hn::LoadU(d4, from + 2 * ldw), e = hn::LoadU(d4, from + 3 * ldw);
      const auto ab_low = hn::BitCast(d64, hn::InterleaveLower(d4, a, b));
      const auto ab_high = hn::BitCast(d64, hn::InterleaveUpper(d4, a, b));
      const auto ce_low = hn::BitCast(d64, hn::InterleaveLower(d4, c, e));
      const auto ce_high = hn::BitCast(d64, hn::InterleaveUpper(d4, c, e));
      float* out = to + i * ldt + m;
      hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d64, ab_low, ce_low)), d4, out);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d64, ab_low, ce_low)), d4, out + ldt);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d64, ab_high, ce_high)), d4, out + 2 * ldt);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d64, ab_high, ce_high)), d4, out + 3 * ldt);
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t first = m < square_rows ? square_columns : 0;
    for (int64_t i = first; i < columns; ++i) to[i * ldt + m] = w[m * ldw + i];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace detour::kernels {
namespace {

uint16_t ToHalf(float x) {
  const uint16_t half = F32ToF16Bits(std::bit_cast<uint32_t>(x));
  if ((half & 0x7c00) == 0x7c00) {
    Fail("weights.range",
         "a block of weights needs a scale of {}: expected at most 65504. Hint: --weights f32", x);
  }
  return half;
}

}  // namespace

void QuantizeBlock(WeightFormat format, const float* w, int64_t n, QuantBlock* block) {
  float padded[kQuantBlock];
  if (n < kQuantBlock) {
    std::fill(std::copy_n(w, n, padded), padded + kQuantBlock, w[0]);
    w = padded;
  }
  float low, high;
  DETOUR_DISPATCH(RangeOf)(w, &low, &high);
  float min = 0, scale = 0;
  if (format == WeightFormat::kQ8) {
    scale = std::max(std::abs(low), std::abs(high)) / 127;
  } else if (format == WeightFormat::kQ4) {
    const float largest = std::abs(low) >= std::abs(high) ? low : high;
    scale = largest != 0 ? largest / -8 : 0;
  } else {
    min = low;
    scale = (high - low) / 15;
  }
  block->scale = ToHalf(std::isnan(low) ? low : scale);
  block->min = ToHalf(min);
  const float inverse = scale != 0 ? 1 / scale : 0;
  DETOUR_DISPATCH(RoundBlock)(format, w, min, inverse, block->q);
  std::fill(block->q + n, block->q + kQuantBlock, format == WeightFormat::kQ4 ? 8 : 0);
}

void Transpose(const float* w, int64_t ldw, int64_t rows, int64_t columns, float* to, int64_t ldt) {
  DETOUR_DISPATCH(Transpose)(w, ldw, rows, columns, to, ldt);
}

}  // namespace detour::kernels
#endif  // HWY_ONCE
