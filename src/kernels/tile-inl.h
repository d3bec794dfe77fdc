// The one inner loop of matrix products and attention: a tile of rows times vectors of outputs,
// accumulators in registers, sequential over the reduction. Once per SIMD target.
#if defined(DETOUR_KERNELS_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DETOUR_KERNELS_TILE_INL_H_
#undef DETOUR_KERNELS_TILE_INL_H_
#else
#define DETOUR_KERNELS_TILE_INL_H_
#endif

#include <cstdint>

#include "kernels/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

// 12 × 2 vectors of the 32 registers of AVX-512, 6 × 2 of the 16 of AVX2; the rest hold operands.
inline constexpr int kTileRows = kLanes == 16 ? 12 : 6;

// Left operands are copied to rows of this many floats: a constant row stride costs no address
// arithmetic, and an odd number of cache lines spreads the rows over the cache's sets.
inline constexpr int kMaxDepth = 512;
static_assert(kMaxHeadDim <= kMaxDepth);
inline constexpr int kXStride = kMaxDepth + 16;

/// Vectors side by side in a tile of `rows` rows: few rows take more of them, to hide the latency
/// of FMA and to read more memory at once.
constexpr int TileVectors(int rows) { return rows * 4 <= kTileRows * 2 ? 4 : 2; }

template <int kRows, int kVectors>
struct Tile {
  V acc[kRows][kVectors];

  HWY_INLINE void Clear() {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::Zero(d);
    }
  }

  /// From and to kRows rows of `ldy`; with `first` from 0.
  HWY_INLINE void Load(const float* y, int64_t ldy, bool first) {
    if (first) return Clear();
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::LoadU(d, y + r * ldy + v * kLanes);
    }
  }
  HWY_INLINE void Store(float* y, int64_t ldy) const {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) hn::StoreU(acc[r][v], d, y + r * ldy + v * kLanes);
    }
  }

  /// acc_rv = fma(x[r·kStride + k·kDepthStride], W_v[k·step], acc_rv) for k = 0, 1, … n−1, where
  /// W_v is the v-th vector of the kPointers arrays in turn. `io` reads W: Whole, or Part of a
  /// single vector.
  template <int kStride, int kPointers, int kDepthStride = 1, class Weight, class Io>
  HWY_INLINE void Accumulate(const float* x, int64_t n, const Weight* const* w, int64_t step,
                             const Io& io) {
    static_assert(kVectors % kPointers == 0);
    constexpr int kPer = kVectors / kPointers;
    int64_t offset = 0;
    for (int64_t k = 0; k < n; ++k, offset += step) {
      V right[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        right[v] = io.Load(w[v / kPer] + offset + v % kPer * kLanes);
      }
      for (int r = 0; r < kRows; ++r) {
        const V left = hn::Set(d, x[r * kStride + k * kDepthStride]);
        for (int v = 0; v < kVectors; ++v) acc[r][v] = hn::MulAdd(left, right[v], acc[r][v]);
      }
    }
  }
};

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#endif  // DETOUR_KERNELS_TILE_INL_H_
