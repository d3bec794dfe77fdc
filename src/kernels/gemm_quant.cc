// Products with quantized weights: integer dot products of blocks of 32 inputs, exact on every
// target, then one fma per block. Rows of x are quantized by the block of outputs that needs them.
// clang-format off
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm_quant.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include <hwy/cache_control.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/gemm.h"
#include "kernels/kernels.h"
#include "kernels/math-inl.h"
#include "kernels/scratch.h"

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

#define DETOUR_QUANT_VNNI 0
#include "kernels/gemm_quant-inl.h"
#undef DETOUR_QUANT_VNNI

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#if HWY_TARGET == HWY_AVX3
// The same once more with VNNI, which not every CPU with AVX-512 has.
HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR_AVX3 ",avx512vnni")
namespace detour::kernels {
namespace HWY_NAMESPACE {
namespace vnni {

#define DETOUR_QUANT_VNNI 1
#include "kernels/gemm_quant-inl.h"
#undef DETOUR_QUANT_VNNI

}  // namespace vnni
}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_POP_ATTRIBUTES
#endif

#if HWY_ONCE
namespace detour::kernels {
namespace {

std::atomic<bool> use_vnni{true};

}  // namespace

void AllowVnni(bool allowed) { use_vnni = allowed; }

GemmBlockFn QuantGemmBlock() {
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  if (UseAvx512() && has_vnni && use_vnni) return N_AVX3::vnni::RunQuantGemmBlock;
  return DETOUR_DISPATCH(RunQuantGemmBlock);
}

}  // namespace detour::kernels
#endif  // HWY_ONCE
