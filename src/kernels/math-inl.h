// Vector types and helpers of the kernels, once per SIMD target: loops with a partial last vector,
// reductions over 16 virtual lanes, and exp.
#if defined(DETOUR_KERNELS_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DETOUR_KERNELS_MATH_INL_H_
#undef DETOUR_KERNELS_MATH_INL_H_
#else
#define DETOUR_KERNELS_MATH_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <limits>

#include "kernels/reference.h"

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
using Mask = hn::Mask<D>;
inline constexpr D d{};
inline constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
inline constexpr int kParts = 16 / kLanes;  // vectors that hold the 16 virtual lanes
static_assert(kParts == 1 || kParts == 2);

/// How a body of Sweep reads and writes its vector: whole, or its first lanes only (the others read
/// as 0 and are not written; OrElse sets them).
struct Whole {
  HWY_INLINE V Load(const float* p) const { return hn::LoadU(d, p); }
  HWY_INLINE V Load(const hwy::bfloat16_t* p) const {
    return hn::PromoteTo(d, hn::LoadU(hn::Rebind<hwy::bfloat16_t, D>(), p));
  }
  HWY_INLINE void Store(V v, float* p) const { hn::StoreU(v, d, p); }
  HWY_INLINE V OrElse(V v, float) const { return v; }
};
struct Part {
  Mask mask;
  explicit Part(int64_t n) : mask(hn::FirstN(d, static_cast<size_t>(n))) {}
  HWY_INLINE V Load(const float* p) const { return hn::MaskedLoad(mask, d, p); }
  HWY_INLINE void Store(V v, float* p) const { hn::BlendedStore(v, mask, d, p); }
  HWY_INLINE V OrElse(V v, float other) const { return hn::IfThenElse(mask, v, hn::Set(d, other)); }
};

/// body(io, i) for each vector of elements i, i + 1, … of [0, n).
template <class Body>
HWY_INLINE void Sweep(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(Whole(), i);
  if (i < n) body(Part(n - i), i);
}

/// 16 virtual lanes: element i belongs to lane i mod 16.
struct Lanes {
  V part[kParts];
  explicit Lanes(float value) {
    for (V& v : part) v = hn::Set(d, value);
  }
};

/// body(io, i, part) for each vector of [0, n); `part` is the vector of Lanes that i belongs to.
/// A partial vector adds +0 to the lanes it lacks, which leaves them as they are.
template <class Body>
HWY_INLINE void SweepLanes(int64_t n, Lanes& lanes, const Body& body) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    body(Whole(), i, lanes.part[0]);
    if constexpr (kParts == 2) body(Whole(), i + kLanes, lanes.part[1]);
  }
  if constexpr (kParts == 2) {
    if (i + kLanes <= n) {
      body(Whole(), i, lanes.part[0]);
      if (i + kLanes < n) body(Part(n - i - kLanes), i + kLanes, lanes.part[1]);
      return;
    }
  }
  if (i < n) body(Part(n - i), i, lanes.part[0]);
}

/// The fixed tree: lane[j] += lane[j + h] for h = 8, 4, 2, 1.
HWY_INLINE float SumLanes(const Lanes& lanes) {
  alignas(64) float lane[16];
  for (int p = 0; p < kParts; ++p) hn::Store(lanes.part[p], d, lane + p * kLanes);
  for (int h = 8; h > 0; h /= 2) {
    for (int j = 0; j < h; ++j) lane[j] += lane[j + h];
  }
  return lane[0];
}

HWY_INLINE float MaxLanes(const Lanes& lanes) {
  V max = lanes.part[0];
  for (int p = 1; p < kParts; ++p) max = hn::Max(max, lanes.part[p]);
  return hn::GetLane(hn::MaxOfLanes(d, max));
}

/// reference::Exp on each lane: the same operations in the same order.
HWY_INLINE V Exp(V x) {
  namespace e = reference::exp_constants;
  const hn::RebindToUnsigned<D> du;
  const V magic = hn::Set(d, e::kMagic);
  const V z = hn::MulAdd(x, hn::Set(d, e::kLog2E), magic);
  const V n = hn::Sub(z, magic);
  V r = hn::NegMulAdd(n, hn::Set(d, e::kLn2High), x);
  r = hn::NegMulAdd(n, hn::Set(d, e::kLn2Low), r);
  V p = hn::Set(d, e::kC6);
  p = hn::MulAdd(p, r, hn::Set(d, e::kC5));
  p = hn::MulAdd(p, r, hn::Set(d, e::kC4));
  p = hn::MulAdd(p, r, hn::Set(d, e::kC3));
  p = hn::MulAdd(p, r, hn::Set(d, e::kC2));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  const V y = hn::BitCast(d, hn::Add(hn::BitCast(du, p), hn::ShiftLeft<23>(hn::BitCast(du, z))));
  const V infinity = hn::Set(d, std::numeric_limits<float>::infinity());
  const V capped = hn::IfThenElse(hn::Le(x, hn::Set(d, e::kMax)), y, hn::Add(x, infinity));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, e::kMin)), capped);
}

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#endif  // DETOUR_KERNELS_MATH_INL_H_
