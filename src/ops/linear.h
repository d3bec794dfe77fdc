// Matrix parameters and the products with them.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "kernels/kernels.h"

namespace detour::ops {

/// Pointer to the data of a contiguous f32 CPU tensor. CHECKs that it is one.
float* F32(const at::Tensor& t);
const int32_t* I32(const at::Tensor& t);

/// A weight W [M,K] (rows = outputs, as torch.nn.Linear) and optional bias [M], with the packed
/// copy the kernels read. The copy follows the weight: it is made anew when the tensor's version
/// has changed. Copies share the packed data. Not thread-safe: one forward pass at a time per
/// weight.
class Matrix {
 public:
  at::Tensor weight;  ///< of a compact matrix on the meta device: a shape without data
  at::Tensor bias;    ///< undefined if there is none

  const kernels::PackedMatrix& Packed() const;
  /// Packs the weight in `format` and lets go of the tensor's data: for serving only.
  void Compact(kernels::WeightFormat format);
  /// Takes a packed weight of the same shape instead.
  void Compact(kernels::PackedMatrix packed);

 private:
  struct Cache {
    kernels::PackedMatrix packed;
    const void* data = nullptr;
    int64_t version = -1;
  };
  std::shared_ptr<Cache> cache_ = std::make_shared<Cache>();
};

/// Rows ids_N (i32) of a compact matrix, [N, K]; without gradient. CHECKs the ids.
at::Tensor PackedRows(const Matrix& matrix, const at::Tensor& ids_N);

/// y_NM = a_NK b_KM, and y_NM += a_KNᵀ b_KM, without gradients: products of backward passes
/// (kernels::GemmBackward), the same bits on any number of threads.
void Product(const at::Tensor& a_NK, const at::Tensor& b_KM, at::Tensor& y_NM);
void AddTransposedProduct(const at::Tensor& a_KN, const at::Tensor& b_KM, at::Tensor& y_NM);

/// y_NM = x_NK Wᵀ + bias. Forward: kernels::Gemm, counted in the op counter. Backward: the above.
at::Tensor Linear(const at::Tensor& x_NK, const Matrix& matrix);

}  // namespace detour::ops
