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

/// Adds the divergence's gradient to dlogits (null: none is asked for) and fills `kl`, both for the
/// n rows of a chunk whose logits of student and teacher these are.
void Diverge(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& counts,
             double temperature, double scale, at::Tensor* dlogits, at::Tensor kl) {
  const at::Tensor log_q = at::log_softmax(student / temperature, 1);
  const at::Tensor log_p = at::log_softmax(teacher / temperature, 1);
  const at::Tensor p = log_p.exp();
  kl.copy_((p * (log_p - log_q)).sum(1) * counts);
  if (dlogits) *dlogits = (log_q.exp() - p).mul_((counts * (scale * temperature)).unsqueeze(1));
}

/// What the loss of a head needs beside tensors with gradients.
struct HeadArgs {
  const Matrix* head;
  double scale;
  at::Tensor *loss_N, *divergence_N;
  const Teacher* teacher;
  bool with_grad;
};

struct HeadLossFn : torch::autograd::Function<HeadLossFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h, const at::Tensor& weight,
                            const at::Tensor& targets, const HeadArgs& args) {
    const bool with_grad = args.with_grad;
    const Teacher* teacher = args.teacher;
    const double kl_share = teacher ? teacher->weight : 0, scale = args.scale * (1 - kl_share);
    const int64_t num_rows = h.size(0), dim = h.size(1), vocab = weight.size(0);
    at::Tensor losses = at::empty({num_rows}, h.options());
    at::Tensor dh, dw;
    if (with_grad) {
      dh = at::empty_like(h);
      if (weight.requires_grad()) dw = at::zeros_like(weight);
    }
    kernels::PackedMatrix weight_t;
    if (with_grad) weight_t.PackTransposed(F32(weight), dim, vocab, dim);
    const int64_t chunk = ChunkRows(vocab);
    at::Tensor logits = at::empty({std::min(chunk, num_rows), vocab}, h.options());
    at::Tensor kl, counts, taught;
    if (teacher) {
      kl = at::zeros({num_rows}, h.options());
      counts = (targets >= 0).to(at::kFloat);
      taught = at::empty_like(logits);
    }
    for (int64_t begin = 0; begin < num_rows; begin += chunk) {
      const int64_t n = std::min(chunk, num_rows - begin);
      kernels::Gemm(F32(h) + begin * dim, dim, n, args.head->Packed(), nullptr, F32(logits), vocab);
      at::Tensor dkl;
      if (teacher) {
        const int64_t width = teacher->h_ND.size(1);
        kernels::Gemm(F32(teacher->h_ND) + begin * width, width, n, teacher->head->Packed(),
                      nullptr, F32(taught), vocab);
        const double t = teacher->temperature;
        Diverge(logits.slice(0, 0, n), taught.slice(0, 0, n), counts.slice(0, begin, begin + n), t,
                args.scale * kl_share, with_grad ? &dkl : nullptr, kl.slice(0, begin, begin + n));
      }
      kernels::CrossEntropyRows(F32(logits), n, vocab, I32(targets) + begin, with_grad,
                                static_cast<float>(scale), F32(losses) + begin);
      if (with_grad) {
        const at::Tensor dlogits = logits.slice(0, 0, n);
        if (dkl.defined()) dlogits.add_(dkl);
        at::Tensor dh_chunk = dh.slice(0, begin, begin + n);
        kernels::GemmBackward(F32(dlogits), vocab, n, weight_t, {}, F32(dh_chunk), dim);
        if (dw.defined()) AddTransposedProduct(dlogits, h.slice(0, begin, begin + n), dw);
      }
    }
    if (with_grad) ctx->save_for_backward({dh, dw});
    if (args.loss_N) *args.loss_N = losses;
    if (args.divergence_N) *args.divergence_N = kl;
    double sum = 0, divergence = 0;
    for (int64_t i = 0; i < num_rows; ++i) sum += F32(losses)[i];
    for (int64_t i = 0; teacher && i < num_rows; ++i) divergence += F32(kl)[i];
    if (teacher) divergence *= args.scale * kl_share * teacher->temperature * teacher->temperature;
    return at::scalar_tensor(sum * scale + divergence, h.options());
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    const double g = grads[0].item<double>();
    if (g != 1.0) {
      saved[0] = saved[0] * g;
      if (saved[1].defined()) saved[1] = saved[1] * g;
    }
    return {saved[0], saved[1], {}, {}};
  }
};

}  // namespace

namespace {

at::Tensor HeadLoss(const at::Tensor& h_ND, const Matrix& head, const at::Tensor& targets,
                    double scale, at::Tensor* loss_N, const Teacher* teacher,
                    at::Tensor* divergence_N) {
  const bool with_grad = at::GradMode::is_enabled() && h_ND.requires_grad();
  return HeadLossFn::apply(h_ND.contiguous(), head.weight, targets,
                           HeadArgs{&head, scale, loss_N, divergence_N, teacher, with_grad});
}

}  // namespace

at::Tensor LinearCrossEntropy(const at::Tensor& h_ND, const Matrix& head, const at::Tensor& targets,
                              double scale, at::Tensor* loss_N) {
  return HeadLoss(h_ND, head, targets, scale, loss_N, nullptr, nullptr);
}

at::Tensor LinearDistillation(const at::Tensor& h_ND, const Matrix& head, const at::Tensor& targets,
                              double scale, const Teacher& teacher, at::Tensor* loss_N,
                              at::Tensor* divergence_N) {
  DETOUR_CHECK(teacher.h_ND.size(0) == h_ND.size(0) &&
               teacher.head->weight.size(0) == head.weight.size(0));
  return HeadLoss(h_ND, head, targets, scale, loss_N, &teacher, divergence_N);
}

}  // namespace detour::ops
