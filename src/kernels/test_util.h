// Shared by the kernels' tests.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/rng.h"
#include "core/threads.h"
#include "kernels/kernels.h"

namespace detour::kernels {

inline std::vector<float> RandomFloats(int64_t n, uint64_t seed, float scale = 1.0f) {
  const Rng rng(seed, RngPurpose::kTest);
  std::vector<float> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = scale * static_cast<float>(2.0 * rng.Uniform(i) - 1.0);
  return v;
}

/// Equal bits, all NaNs being one.
inline bool SameBits(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) ||
         (std::isnan(a) && std::isnan(b));
}

inline ::testing::AssertionResult SameBits(const std::vector<float>& got,
                                           const std::vector<float>& expected) {
  if (got.size() != expected.size()) return ::testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < got.size(); ++i) {
    if (!SameBits(got[i], expected[i])) {
      return ::testing::AssertionFailure() << "element " << i << " of " << got.size() << ": got "
                                           << got[i] << ", expected " << expected[i];
    }
  }
  return ::testing::AssertionSuccess();
}

inline bool HaveAvx512() {
  try {
    SetSimd(Simd::kAvx512);
    return true;
  } catch (const Error&) {
    return false;
  }
}

/// Runs `fn` on each SIMD target of this machine, with 1 and 2 threads; then restores both.
template <class Fn>
void OnEachTarget(const Fn& fn) {
  const int threads = NumThreads();
  for (const Simd simd : {Simd::kAvx2, Simd::kAvx512}) {
    if (simd == Simd::kAvx512 && !HaveAvx512()) continue;
    SetSimd(simd);
    for (const int t : {1, 2}) {
      SetNumThreads(t);
      SCOPED_TRACE(SimdName() + ", threads " + std::to_string(t));
      fn();
    }
  }
  SetSimd(Simd::kAuto);
  SetNumThreads(threads);
}

}  // namespace detour::kernels
