// Which SIMD target the kernels run on. Each kernel file is compiled once per target by Highway's
// foreach_target.h; DETOUR_DISPATCH picks the one in force. Include this before foreach_target.h.
#pragma once

// AVX2 (with FMA) is the oldest target compiled: one without FMA would compute other bits.
#define HWY_BASELINE_TARGETS HWY_AVX2

namespace detour::kernels {

/// True for AVX-512, false for AVX2. Throws Error("kernels.simd") on a CPU that has neither.
bool UseAvx512();

}  // namespace detour::kernels

/// The function `name` of the target in force. Naming both makes a target that was not compiled an
/// error of the build.
#define DETOUR_DISPATCH(name) (::detour::kernels::UseAvx512() ? N_AVX3::name : N_AVX2::name)
