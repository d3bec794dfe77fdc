#include "kernels/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "core/half.h"

namespace detour::kernels::reference {

float Exp(float x) {
  using namespace exp_constants;
  const float z = std::fma(x, kLog2E, kMagic);
  const float n = z - kMagic;
  float r = std::fma(-n, kLn2High, x);
  r = std::fma(-n, kLn2Low, r);
  float p = kC6;
  p = std::fma(p, r, kC5);
  p = std::fma(p, r, kC4);
  p = std::fma(p, r, kC3);
  p = std::fma(p, r, kC2);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  if (!(x <= kMax)) return x + std::numeric_limits<float>::infinity();
  if (x < kMin) return 0.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(z) << 23));
}

void Gemm(const float* x, int64_t ldx, int64_t num_rows, const float* w, int64_t num_outputs,
          int64_t num_inputs, const float* bias, float* y, int64_t ldy) {
  for (int64_t n = 0; n < num_rows; ++n) {
    for (int64_t m = 0; m < num_outputs; ++m) {
      float acc = 0;
      for (int64_t k = 0; k < num_inputs; ++k) {
        acc = std::fma(x[n * ldx + k], w[m * num_inputs + k], acc);
      }
      y[n * ldy + m] = bias ? acc + bias[m] : acc;
    }
  }
}

void GemmQuant(const float* x, int64_t ldx, int64_t num_rows, const QuantBlock* w,
               WeightFormat format, int64_t num_outputs, int64_t num_inputs, const float* bias,
               float* y, int64_t ldy) {
  const int64_t num_blocks = (num_inputs + kQuantBlock - 1) / kQuantBlock;
  const auto half = [](uint16_t bits) { return std::bit_cast<float>(F16ToF32Bits(bits)); };
  for (int64_t n = 0; n < num_rows; ++n) {
    for (int64_t m = 0; m < num_outputs; ++m) {
      float acc = 0;
      for (int64_t b = 0; b < num_blocks; ++b) {
        const float* block = x + n * ldx + b * kQuantBlock;
        const int64_t count = std::min(kQuantBlock, num_inputs - b * kQuantBlock);
        const QuantBlock& weights = w[m * num_blocks + b];
        float max = 0, scale = 0;
        for (int64_t i = 0; i < count; ++i) {
          max = std::isfinite(block[i]) ? std::max(max, std::abs(block[i])) : NAN;
          if (std::isnan(max)) break;
        }
        scale = max / 127.0f;
        const float inverse = max >= kLeastQuantized ? 127.0f / max : 0.0f;
        int32_t dot = 0, sum = 0;
        for (int64_t i = 0; i < count; ++i) {
          const int32_t q =
              inverse > 0 ? static_cast<int32_t>(std::nearbyint(block[i] * inverse)) : 0;
          dot += q * (weights.q[i] - (format == WeightFormat::kQ4 ? 8 : 0));
          sum += q;
        }
        acc = std::fma(static_cast<float>(dot), scale * half(weights.scale), acc);
        if (format == WeightFormat::kQ4Min) {
          acc = std::fma(static_cast<float>(sum), scale * half(weights.min), acc);
        }
      }
      y[n * ldy + m] = bias ? acc + bias[m] : acc;
    }
  }
}

namespace {

/// One query row and head.
void AttendOne(const KvLayout& layout, float scale, const float* q, const float* const* pages,
               int64_t kv_head, const RowView& view, float* out, float* lse) {
  const int64_t dim = layout.head_dim;
  const int64_t k_at = kv_head * dim * kPageEntries;
  const int64_t v_at = k_at + layout.num_kv_heads * dim * kPageEntries;
  std::vector<float> p(view.end);
  const auto seen = [&](int64_t j) { return j < view.kept || j >= view.begin; };
  float max = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < view.end; ++j) {
    if (!seen(j)) continue;
    const float* k = pages[j / kPageEntries] + k_at + j % kPageEntries;
    float acc = 0;
    for (int64_t i = 0; i < dim; ++i) acc = std::fma(q[i], k[i * kPageEntries], acc);
    p[j] = scale * acc;
    max = std::max(max, p[j]);
  }
  for (int64_t j = 0; j < view.end; ++j) p[j] = seen(j) ? Exp(p[j] - max) : 0;
  const float sum = LaneSum(view.end, [&](float lane, int64_t j) { return lane + p[j]; });
  for (int64_t i = 0; i < dim; ++i) {
    float acc = 0;
    for (int64_t j = 0; j < view.end; ++j) {
      if (!seen(j)) continue;
      acc = std::fma(p[j], pages[j / kPageEntries][v_at + j % kPageEntries * dim + i], acc);
    }
    out[i] = acc / sum;
  }
  if (lse) *lse = static_cast<float>(max + std::log(static_cast<double>(sum)));
}

}  // namespace

void Attend(const KvLayout& layout, int64_t num_heads, float scale, const float* q, int64_t ldq,
            std::span<const AttendSegment> segments, float* out, int64_t ldout, float* lse_RH) {
  const int64_t group = num_heads / layout.num_kv_heads, dim = layout.head_dim;
  for (const AttendSegment& s : segments) {
    for (int64_t i = 0; i < s.num_rows; ++i) {
      const int64_t row = s.row_begin + i;
      for (int64_t h = 0; h < num_heads; ++h) {
        if (s.head >= 0 && s.head != h) continue;
        AttendOne(layout, scale, q + row * ldq + h * dim, s.pages, h / group, s.View(i),
                  out + row * ldout + h * dim, lse_RH ? lse_RH + row * num_heads + h : nullptr);
      }
    }
  }
}

void RmsNorm(const float* x, int64_t num_rows, int64_t dim, const float* w, float eps, float* y,
             float* inv_rms_N) {
  for (int64_t n = 0; n < num_rows; ++n, x += dim, y += dim) {
    const float sum =
        LaneSum(dim, [&](float lane, int64_t i) { return std::fma(x[i], x[i], lane); });
    const float inv = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
    for (int64_t i = 0; i < dim; ++i) y[i] = x[i] * inv * w[i];
    if (inv_rms_N) inv_rms_N[n] = inv;
  }
}

void RmsNormBackward(const float* dy, const float* x, const float* w, const float* inv_rms_N,
                     int64_t num_rows, int64_t dim, float* dx, float* dw) {
  std::fill(dw, dw + dim, 0.0f);
  std::vector<float> chunk(dim);
  for (int64_t n = 0; n < num_rows; ++n, x += dim, dy += dim, dx += dim) {
    const float inv = inv_rms_N[n];
    const float dot =
        LaneSum(dim, [&](float lane, int64_t i) { return std::fma(dy[i] * w[i], x[i], lane); });
    const float c = inv * inv * dot / static_cast<float>(dim);
    for (int64_t i = 0; i < dim; ++i) {
      chunk[i] = std::fma(dy[i], x[i] * inv, chunk[i]);
      dx[i] = inv * std::fma(-x[i], c, dy[i] * w[i]);
    }
    if (n % 64 == 63 || n + 1 == num_rows) {
      for (int64_t i = 0; i < dim; ++i) dw[i] += chunk[i];
      std::fill(chunk.begin(), chunk.end(), 0.0f);
    }
  }
}

void Rope(const float* x, int64_t ldx, int64_t num_rows, int64_t num_heads, int64_t head_dim,
          const int32_t* positions, const float* cos_sin, bool inverse, float* y, int64_t ldy) {
  const int64_t half = head_dim / 2;
  for (int64_t n = 0; n < num_rows; ++n) {
    const float* c = cos_sin + positions[n] * head_dim;
    for (int64_t h = 0; h < num_heads; ++h) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = x[n * ldx + h * head_dim + i], b = x[n * ldx + h * head_dim + half + i];
        const float s = inverse ? -c[half + i] : c[half + i];
        y[n * ldy + h * head_dim + i] = std::fma(a, c[i], -(b * s));
        y[n * ldy + h * head_dim + half + i] = std::fma(b, c[i], a * s);
      }
    }
  }
}

void SiluMul(const float* g, const float* u, int64_t n, float* h) {
  for (int64_t i = 0; i < n; ++i) h[i] = g[i] / (1.0f + Exp(-g[i])) * u[i];
}

void SiluMulBackward(const float* dh, const float* g, const float* u, int64_t n, float* dg,
                     float* du) {
  for (int64_t i = 0; i < n; ++i) {
    const float gate = g[i], up = u[i], s = 1.0f / (1.0f + Exp(-gate));
    dg[i] = dh[i] * up * (s * std::fma(gate, 1.0f - s, 1.0f));
    du[i] = dh[i] * (gate * s);
  }
}

void Silu(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] / (1.0f + Exp(-x[i]));
}

void SiluBackward(const float* dy, const float* x, int64_t n, float* dx) {
  for (int64_t i = 0; i < n; ++i) {
    const float s = 1.0f / (1.0f + Exp(-x[i]));
    dx[i] = dy[i] * (s * std::fma(x[i], 1.0f - s, 1.0f));
  }
}

void Sigmoid(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = 1.0f / (1.0f + Exp(-x[i]));
}

void AddScaledRows(const float* x, const float* f, const float* weight_N, int64_t num_rows,
                   int64_t dim, float* y) {
  for (int64_t i = 0; i < num_rows * dim; ++i) {
    y[i] = weight_N ? std::fma(weight_N[i / dim], f[i], x[i]) : x[i] + f[i];
  }
}

void CrossEntropyRows(float* logits, int64_t num_rows, int64_t vocab, const int32_t* targets,
                      bool write_gradient, float gradient_scale, float* loss_N) {
  for (int64_t n = 0; n < num_rows; ++n, logits += vocab) {
    const int32_t target = targets[n];
    loss_N[n] = 0;
    if (target < 0) {
      if (write_gradient) std::fill(logits, logits + vocab, 0.0f);
      continue;
    }
    const float max = *std::max_element(logits, logits + vocab);
    const float sum =
        LaneSum(vocab, [&](float lane, int64_t i) { return lane + Exp(logits[i] - max); });
    loss_N[n] = static_cast<float>(std::log(static_cast<double>(sum)) + max - logits[target]);
    if (!write_gradient) continue;
    for (int64_t i = 0; i < vocab; ++i) {
      const float p = Exp(logits[i] - max) / sum;
      logits[i] = (i == target ? p - 1.0f : p) * gradient_scale;
    }
  }
}

}  // namespace detour::kernels::reference
