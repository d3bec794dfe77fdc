#include "kernels/simd.h"

#include <hwy/targets.h>

#include <atomic>

#include "core/error.h"
#include "kernels/kernels.h"

namespace detour::kernels {
namespace {

static_assert(HWY_TARGETS == (HWY_AVX2 | HWY_AVX3), "the targets that DETOUR_DISPATCH names");

// The target in force; kAuto until the first use.
std::atomic<Simd> chosen{Simd::kAuto};

Simd Resolve(Simd simd) {
  const int64_t supported = hwy::SupportedTargets();
  if (!(supported & HWY_AVX2)) {
    Fail("kernels.simd", "this CPU lacks AVX2 with FMA. Hint: Detour needs a CPU with both");
  }
  if (simd == Simd::kAuto) return supported & HWY_AVX3 ? Simd::kAvx512 : Simd::kAvx2;
  if (simd == Simd::kAvx512 && !(supported & HWY_AVX3)) {
    Fail("kernels.simd", "avx512: this CPU lacks it (F, VL, DQ, BW). Hint: take avx2 or auto");
  }
  return simd;
}

Simd Chosen() {
  Simd simd = chosen.load(std::memory_order_relaxed);
  if (simd == Simd::kAuto) [[unlikely]] {
    simd = Resolve(Simd::kAuto);
    chosen = simd;
  }
  return simd;
}

}  // namespace

bool UseAvx512() { return Chosen() == Simd::kAvx512; }

void SetSimd(Simd simd) { chosen = Resolve(simd); }

Simd ParseSimd(const std::string& name) {
  if (name == "auto") return Simd::kAuto;
  if (name == "avx2") return Simd::kAvx2;
  if (name == "avx512") return Simd::kAvx512;
  Fail("flag.simd", "expected auto, avx2 or avx512, got '{}'", name);
}

std::string SimdName() { return UseAvx512() ? "avx512" : "avx2"; }

}  // namespace detour::kernels
