// The scalar twin of every kernel: each formula of kernels.h as plain loops in the order it
// promises, with std::fma. The kernels must equal these bit for bit; serial, slow, never optimised.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/kernels.h"

namespace detour::kernels::reference {

namespace exp_constants {
// exp(x) = 2^n e^r with n = round(x log2 e), r = x − n ln 2 in two parts. Adding kMagic = 1.5·2^23
// rounds to an integer, whose low bits are then n. e^r on |r| <= ln 2 / 2: 1 + r + c2 r² + … + c6
// r⁶, by Remez's exchange for least relative error (3.1e-9), coefficients rounded to f32.
inline constexpr float kLog2E = 0x1.715476p+0f;
inline constexpr float kMagic = 0x1.8p+23f;
inline constexpr float kLn2High = 0.693359375f;    // 355/512: n · kLn2High is exact
inline constexpr float kLn2Low = -2.12194440e-4f;  // ln 2 − kLn2High
inline constexpr float kC2 = 0x1.fffffcp-2f;
inline constexpr float kC3 = 0x1.555492p-3f;
inline constexpr float kC4 = 0x1.5558f2p-5f;
inline constexpr float kC5 = 0x1.123a20p-7f;
inline constexpr float kC6 = 0x1.6a23d0p-10f;
inline constexpr float kMax = 0x1.62e42ep+6f;   // 88.7228: above, infinity
inline constexpr float kMin = -0x1.5d589ep+6f;  // −87.3365: below, exp < 2^−126, which becomes 0
}  // namespace exp_constants

/// e^x within 1 ulp; +0 where e^x is not a normal number; NaN for NaN.
float Exp(float x);

/// 16-lane sum of value(i) for i in [0, n) (kernels.h). `add` maps (lane, i) to the new lane.
template <class Add>
float LaneSum(int64_t n, const Add& add) {
  float lane[16] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % 16] = add(lane[i % 16], i);
  for (int h = 8; h > 0; h /= 2) {
    for (int j = 0; j < h; ++j) lane[j] += lane[j + h];
  }
  return lane[0];
}

/// As kernels::Gemm with W [M,K] row-major.
void Gemm(const float* x, int64_t ldx, int64_t num_rows, const float* w, int64_t num_outputs,
          int64_t num_inputs, const float* bias, float* y, int64_t ldy);
/// As kernels::Gemm with quantized weights: ceil(K/32) blocks an output.
void GemmQuant(const float* x, int64_t ldx, int64_t num_rows, const QuantBlock* w,
               WeightFormat format, int64_t num_outputs, int64_t num_inputs, const float* bias,
               float* y, int64_t ldy);
void Attend(const KvLayout& layout, int64_t num_heads, float scale, const float* q, int64_t ldq,
            std::span<const AttendSegment> segments, float* out, int64_t ldout, float* lse_RH);
void RmsNorm(const float* x, int64_t num_rows, int64_t dim, const float* w, float eps, float* y,
             float* inv_rms_N);
void RmsNormBackward(const float* dy, const float* x, const float* w, const float* inv_rms_N,
                     int64_t num_rows, int64_t dim, float* dx, float* dw);
void Rope(const float* x, int64_t ldx, int64_t num_rows, int64_t num_heads, int64_t head_dim,
          const int32_t* positions, const float* cos_sin, bool inverse, float* y, int64_t ldy);
void SiluMul(const float* g, const float* u, int64_t n, float* h);
void SiluMulBackward(const float* dh, const float* g, const float* u, int64_t n, float* dg,
                     float* du);
void Silu(const float* x, int64_t n, float* y);
void SiluBackward(const float* dy, const float* x, int64_t n, float* dx);
void Sigmoid(const float* x, int64_t n, float* y);
void AddScaledRows(const float* x, const float* f, const float* weight_N, int64_t num_rows,
                   int64_t dim, float* y);
void CrossEntropyRows(float* logits, int64_t num_rows, int64_t vocab, const int32_t* targets,
                      bool write_gradient, float gradient_scale, float* loss_N);

}  // namespace detour::kernels::reference
