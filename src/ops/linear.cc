#include "ops/linear.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.h"

namespace detour::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

float* F32(const at::Tensor& t) {
  DETOUR_CHECK(t.defined() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.is_cpu());
  return t.data_ptr<float>();
}

const int32_t* I32(const at::Tensor& t) {
  DETOUR_CHECK(t.defined() && t.scalar_type() == at::kInt && t.is_contiguous() && t.is_cpu());
  return t.data_ptr<int32_t>();
}

const kernels::PackedMatrix& Matrix::Packed() const {
  if (weight.is_meta()) return cache_->packed;
  // Inference tensors carry no version: they are never written after loading.
  const int64_t version = weight.is_inference() ? 0 : weight._version();
  if (cache_->version != version || cache_->data != weight.const_data_ptr()) {
    DETOUR_CHECK(weight.dim() == 2);
    cache_->packed.Pack(F32(weight), weight.size(0), weight.size(1), weight.size(1));
    cache_->version = version;
    cache_->data = weight.const_data_ptr();
  }
  return cache_->packed;
}

void Matrix::Compact(kernels::WeightFormat format) {
  kernels::PackedMatrix packed;
  packed.Pack(F32(weight), weight.size(0), weight.size(1), weight.size(1), format);
  Compact(std::move(packed));
}

void Matrix::Compact(kernels::PackedMatrix packed) {
  DETOUR_CHECK(packed.num_outputs() == weight.size(0) && packed.num_inputs() == weight.size(1));
  cache_->packed = std::move(packed);
  weight = at::empty(weight.sizes(), at::TensorOptions(at::kFloat).device(at::kMeta));
}

at::Tensor PackedRows(const Matrix& matrix, const at::Tensor& ids_N) {
  const kernels::PackedMatrix& packed = matrix.Packed();
  at::Tensor y = at::empty({ids_N.size(0), packed.num_inputs()}, at::kFloat);
  for (int64_t i = 0; i < ids_N.size(0); ++i) {
    packed.CopyRow(I32(ids_N)[i], F32(y) + i * packed.num_inputs());
  }
  return y;
}

namespace {

/// [K, M] as the packed right-hand side of a product, in a buffer that the thread keeps.
const kernels::PackedMatrix& PackRight(const at::Tensor& b_KM) {
  thread_local kernels::PackedMatrix packed;
  packed.PackTransposed(F32(b_KM), b_KM.size(1), b_KM.size(0), b_KM.size(1));
  return packed;
}

}  // namespace

void Product(const at::Tensor& a_NK, const at::Tensor& b_KM, at::Tensor& y_NM) {
  DETOUR_CHECK(a_NK.size(1) == b_KM.size(0));
  if (a_NK.size(0) == 0) return;
  kernels::GemmBackward(F32(a_NK), a_NK.size(1), a_NK.size(0), PackRight(b_KM), {}, F32(y_NM),
                        b_KM.size(1));
}

void AddTransposedProduct(const at::Tensor& a_KN, const at::Tensor& b_KM, at::Tensor& y_NM) {
  DETOUR_CHECK(a_KN.size(0) == b_KM.size(0));
  if (a_KN.size(0) == 0) return;
  kernels::GemmBackward(F32(a_KN), a_KN.size(1), a_KN.size(1), PackRight(b_KM),
                        {.transposed = true, .add = true}, F32(y_NM), b_KM.size(1));
}

namespace {

struct LinearFn : torch::autograd::Function<LinearFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const Matrix* matrix) {
    const int64_t num_rows = x.size(0);
    DETOUR_CHECK(x.dim() == 2 && x.size(1) == weight.size(1), "x {} against weight {}", x.size(1),
                 weight.size(1));
    at::Tensor y = at::empty({num_rows, weight.size(0)}, x.options());
    kernels::Gemm(F32(x), x.size(1), num_rows, matrix->Packed(), bias ? F32(*bias) : nullptr,
                  F32(y), weight.size(0));
    ctx->save_for_backward({x, weight});
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], dy = grads[0].contiguous();
    at::Tensor dx, dw, db;
    if (ctx->needs_input_grad(0)) {
      dx = at::empty_like(x);
      Product(dy, weight, dx);
    }
    if (ctx->needs_input_grad(1)) {
      dw = at::zeros_like(weight);
      AddTransposedProduct(dy, x, dw);
    }
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) db = dy.sum(0);
    return {dx, dw, db, at::Tensor()};
  }
};

}  // namespace

at::Tensor Linear(const at::Tensor& x_NK, const Matrix& matrix) {
  // A tensor argument of an autograd function may not be undefined; an optional may be empty.
  std::optional<at::Tensor> bias;
  if (matrix.bias.defined()) bias = matrix.bias;
  return LinearFn::apply(x_NK.contiguous(), matrix.weight, bias, &matrix);
}

}  // namespace detour::ops
