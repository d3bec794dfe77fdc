#include "ops/loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "core/error.h"

namespace detour::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

// Rows per chunk: a chunk's logits stay near 16 MB.
int64_t ChunkRows(int64_t vocab) { return std::clamp<int64_t>((4 << 20) / vocab, 64, 1024); }

struct HeadLossFn : torch::autograd::Function<HeadLossFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h, const at::Tensor& weight,
                            const at::Tensor& targets, const Matrix* head, double scale,
                            at::Tensor* loss_N, bool with_grad) {
    const int64_t num_rows = h.size(0), dim = h.size(1), vocab = weight.size(0);
    at::Tensor losses = at::empty({num_rows}, h.options());
    at::Tensor dh, dw;
    if (with_grad) {
      dh = at::empty_like(h);
      if (weight.requires_grad()) dw = at::zeros_like(weight);
    }
    const int64_t chunk = ChunkRows(vocab);
    at::Tensor logits = at::empty({std::min(chunk, num_rows), vocab}, h.options());
    for (int64_t begin = 0; begin < num_rows; begin += chunk) {
      const int64_t n = std::min(chunk, num_rows - begin);
      kernels::Gemm(F32(h) + begin * dim, dim, n, head->Packed(), nullptr, F32(logits), vocab);
      kernels::CrossEntropyRows(F32(logits), n, vocab, I32(targets) + begin, with_grad,
                                static_cast<float>(scale), F32(losses) + begin);
      if (with_grad) {
        const at::Tensor dlogits = logits.slice(0, 0, n);
        at::Tensor dh_chunk = dh.slice(0, begin, begin + n);
        at::mm_out(dh_chunk, dlogits, weight);
        if (dw.defined()) dw.addmm_(dlogits.t(), h.slice(0, begin, begin + n));
      }
    }
    if (with_grad) ctx->save_for_backward({dh, dw});
    if (loss_N) *loss_N = losses;
    double sum = 0;
    for (int64_t i = 0; i < num_rows; ++i) sum += F32(losses)[i];
    return at::scalar_tensor(sum * scale, h.options());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    const double g = grads[0].item<double>();
    if (g != 1.0) {
      saved[0] = saved[0] * g;
      if (saved[1].defined()) saved[1] = saved[1] * g;
    }
    return {saved[0], saved[1], {}, {}, {}, {}, {}};
  }
};

}  // namespace

at::Tensor LinearCrossEntropy(const at::Tensor& h_ND, const Matrix& head, const at::Tensor& targets,
                              double scale, at::Tensor* loss_N) {
  const bool with_grad = at::GradMode::is_enabled() && h_ND.requires_grad();
  return HeadLossFn::apply(h_ND.contiguous(), head.weight, targets, &head, scale, loss_N,
                           with_grad);
}

}  // namespace detour::ops
