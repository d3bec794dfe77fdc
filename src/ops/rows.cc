#include "ops/rows.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "ops/linear.h"

namespace detour::ops {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

struct RmsNormFn : Function<RmsNormFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w,
                            double eps) {
    at::Tensor y = at::empty_like(x);
    at::Tensor inv_rms_N = at::empty({x.size(0)}, x.options());
    kernels::RmsNorm(F32(x), x.size(0), x.size(1), F32(w), static_cast<float>(eps), F32(y),
                     F32(inv_rms_N));
    ctx->save_for_backward({x, w, inv_rms_N});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &w = saved[1], &inv_rms_N = saved[2];
    at::Tensor dx = at::empty_like(x), dw = at::empty_like(w);
    kernels::RmsNormBackward(F32(grads[0].contiguous()), F32(x), F32(w), F32(inv_rms_N), x.size(0),
                             x.size(1), F32(dx), F32(dw));
    return {dx, dw, at::Tensor()};
  }
};

struct SiluMulFn : Function<SiluMulFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& g, const at::Tensor& u) {
    at::Tensor h = at::empty_like(g);
    kernels::SiluMul(F32(g), F32(u), g.numel(), F32(h));
    ctx->save_for_backward({g, u});
    return h;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    at::Tensor dg = at::empty_like(saved[0]), du = at::empty_like(saved[1]);
    kernels::SiluMulBackward(F32(grads[0].contiguous()), F32(saved[0]), F32(saved[1]), dg.numel(),
                             F32(dg), F32(du));
    return {dg, du};
  }
};

struct SiluFn : Function<SiluFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    at::Tensor y = at::empty_like(x);
    kernels::Silu(F32(x), x.numel(), F32(y));
    ctx->save_for_backward({x});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor x = ctx->get_saved_variables()[0];
    at::Tensor dx = at::empty_like(x);
    kernels::SiluBackward(F32(grads[0].contiguous()), F32(x), x.numel(), F32(dx));
    return {dx};
  }
};

struct SigmoidFn : Function<SigmoidFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    at::Tensor y = at::empty_like(x);
    kernels::Sigmoid(F32(x), x.numel(), F32(y));
    ctx->save_for_backward({y});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor y = ctx->get_saved_variables()[0];
    return {grads[0] * y * (1 - y)};
  }
};

struct SoftmaxFn : Function<SoftmaxFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x) {
    const int64_t num_rows = x.size(0), ways = x.size(1);
    at::Tensor below_max = at::empty_like(x), y = at::empty_like(x);
    for (int64_t n = 0; n < num_rows; ++n) {
      const float* from = F32(x) + n * ways;
      float* to = F32(below_max) + n * ways;
      const float max = *std::max_element(from, from + ways);
      for (int64_t c = 0; c < ways; ++c) to[c] = from[c] - max;
    }
    kernels::Exp(F32(below_max), y.numel(), F32(y));
    for (int64_t n = 0; n < num_rows; ++n) {
      float* row = F32(y) + n * ways;
      float sum = 0;
      for (int64_t c = 0; c < ways; ++c) sum += row[c];
      for (int64_t c = 0; c < ways; ++c) row[c] /= sum;
    }
    ctx->save_for_backward({y});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor y = ctx->get_saved_variables()[0];
    const at::Tensor dy_y = grads[0] * y;
    return {dy_y - y * dy_y.sum(1, true)};
  }
};

struct AddScaledFn : Function<AddScaledFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& f,
                            const std::optional<at::Tensor>& weight) {
    at::Tensor y = at::empty_like(x);
    kernels::AddScaledRows(F32(x), F32(f), weight ? F32(*weight) : nullptr, x.size(0), x.size(1),
                           F32(y));
    if (weight) ctx->save_for_backward({f, *weight});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor& dy = grads[0];
    const variable_list saved = ctx->get_saved_variables();
    if (saved.empty()) return {dy, dy, at::Tensor()};
    const at::Tensor &f = saved[0], &weight = saved[1];
    at::Tensor dweight;
    if (ctx->needs_input_grad(2)) dweight = at::linalg_vecdot(dy, f, -1);
    return {dy, dy * weight.unsqueeze(1), dweight};
  }
};

struct GatherRowsFn : Function<GatherRowsFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& rows) {
    at::Tensor y = at::empty({rows.size(0), x.size(1)}, x.options());
    kernels::GatherRows(F32(x), x.size(1), I32(rows), rows.size(0), x.size(1), F32(y), x.size(1));
    ctx->save_for_backward({rows});
    ctx->saved_data["num_rows"] = x.size(0);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor rows = ctx->get_saved_variables()[0];
    const at::Tensor dy = grads[0].contiguous();
    at::Tensor dx = at::zeros({ctx->saved_data["num_rows"].toInt(), dy.size(1)}, dy.options());
    kernels::ScatterRows(F32(dy), dy.size(1), I32(rows), rows.size(0), dy.size(1), F32(dx),
                         dy.size(1));
    return {dx, at::Tensor()};
  }
};

struct ReplaceRowsFn : Function<ReplaceRowsFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& rows,
                            const at::Tensor& y) {
    at::Tensor out = x.clone();
    kernels::ScatterRows(F32(y), y.size(1), I32(rows), rows.size(0), y.size(1), F32(out),
                         out.size(1));
    ctx->save_for_backward({rows});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor rows = ctx->get_saved_variables()[0];
    at::Tensor dx = grads[0].clone();
    dx.index_fill_(0, rows.to(at::kLong), 0);
    return {dx, at::Tensor(), grads[0].index_select(0, rows)};
  }
};

struct AddToRowsFn : Function<AddToRowsFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& rows,
                            const at::Tensor& f, const at::Tensor& weight) {
    at::Tensor y = x.clone();
    const int64_t dim = x.size(1);
    for (int64_t r = 0; r < rows.size(0); ++r) {
      float* row = F32(y) + I32(rows)[r] * dim;
      kernels::AddScaledRows(row, F32(f) + r * dim, F32(weight) + r, 1, dim, row);
    }
    ctx->save_for_backward({rows, f, weight});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &f = saved[1], &weight = saved[2];
    const at::Tensor dy_R = grads[0].index_select(0, saved[0]);
    return {grads[0], at::Tensor(), dy_R * weight.unsqueeze(1), at::linalg_vecdot(dy_R, f, -1)};
  }
};

struct StraightThroughFn : Function<StraightThroughFn> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& hard, const at::Tensor&) {
    return hard.clone();
  }
  static variable_list backward(AutogradContext*, variable_list grads) {
    return {at::Tensor(), grads[0]};
  }
};

struct GateGradientFn : Function<GateGradientFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y, const at::Tensor& difference,
                            const at::Tensor&) {
    ctx->save_for_backward({difference});
    return y.clone();
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {grads[0], at::Tensor(), at::linalg_vecdot(grads[0], ctx->get_saved_variables()[0], -1)};
  }
};

struct EmbedFn : Function<EmbedFn> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& table, const at::Tensor& ids) {
    at::Tensor y = at::empty({ids.size(0), table.size(1)}, table.options());
    kernels::GatherRows(F32(table), table.size(1), I32(ids), ids.size(0), table.size(1), F32(y),
                        table.size(1));
    ctx->save_for_backward({ids});
    ctx->saved_data["vocab_size"] = table.size(0);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor ids = ctx->get_saved_variables()[0];
    return {at::embedding_dense_backward(grads[0].contiguous(), ids,
                                         ctx->saved_data["vocab_size"].toInt(),
                                         /*padding_idx=*/-1, /*scale_grad_by_freq=*/false),
            at::Tensor()};
  }
};

struct RopeFn : Function<RopeFn> {
  static at::Tensor Rotate(const at::Tensor& x, const at::Tensor& positions,
                           const at::Tensor& cos_sin, int64_t head_dim, bool inverse) {
    at::Tensor y = at::empty_like(x);
    kernels::Rope(F32(x), x.size(1), x.size(0), x.size(1) / head_dim, head_dim, I32(positions),
                  F32(cos_sin), inverse, F32(y), x.size(1));
    return y;
  }

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& positions,
                            const at::Tensor& cos_sin, int64_t head_dim) {
    ctx->save_for_backward({positions, cos_sin});
    ctx->saved_data["head_dim"] = head_dim;
    return Rotate(x, positions, cos_sin, head_dim, /*inverse=*/false);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    return {Rotate(grads[0].contiguous(), saved[0], saved[1], ctx->saved_data["head_dim"].toInt(),
                   /*inverse=*/true),
            at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor RmsNorm(const at::Tensor& x_ND, const at::Tensor& w_D, double eps) {
  return RmsNormFn::apply(x_ND, w_D, eps);
}

at::Tensor SiluMul(const at::Tensor& g_NF, const at::Tensor& u_NF) {
  return SiluMulFn::apply(g_NF, u_NF);
}

at::Tensor Silu(const at::Tensor& x) { return SiluFn::apply(x); }

at::Tensor Sigmoid(const at::Tensor& x) { return SigmoidFn::apply(x); }

at::Tensor Softmax(const at::Tensor& x_NC) { return SoftmaxFn::apply(x_NC.contiguous()); }

at::Tensor AddScaled(const at::Tensor& x_ND, const at::Tensor& f_ND, const at::Tensor& weight_N) {
  std::optional<at::Tensor> weight;
  if (weight_N.defined()) weight = weight_N;
  return AddScaledFn::apply(x_ND, f_ND, weight);
}

at::Tensor GatherRows(const at::Tensor& x_ND, const at::Tensor& rows_R) {
  return GatherRowsFn::apply(x_ND, rows_R);
}

at::Tensor ReplaceRows(const at::Tensor& x_ND, const at::Tensor& rows_R, const at::Tensor& y_RD) {
  return ReplaceRowsFn::apply(x_ND, rows_R, y_RD);
}

at::Tensor AddToRows(const at::Tensor& x_ND, const at::Tensor& rows_R, const at::Tensor& f_RD,
                     const at::Tensor& weight_R) {
  return AddToRowsFn::apply(x_ND, rows_R, f_RD, weight_R);
}

at::Tensor StraightThrough(const at::Tensor& hard_N, const at::Tensor& soft_N) {
  return StraightThroughFn::apply(hard_N, soft_N);
}

at::Tensor GateGradient(const at::Tensor& y_ND, const at::Tensor& difference_ND,
                        const at::Tensor& gate_N) {
  return GateGradientFn::apply(y_ND, difference_ND, gate_N);
}

at::Tensor Embed(const at::Tensor& table_VD, const at::Tensor& ids_N) {
  const int32_t* ids = I32(ids_N);
  for (int64_t i = 0; i < ids_N.size(0); ++i) {
    DETOUR_CHECK(ids[i] >= 0 && ids[i] < table_VD.size(0), "id {} of {}", ids[i], table_VD.size(0));
  }
  return EmbedFn::apply(table_VD, ids_N);
}

at::Tensor Rope(const at::Tensor& x, const at::Tensor& positions_R, const at::Tensor& cos_sin,
                int64_t head_dim) {
  return RopeFn::apply(x, positions_R, cos_sin, head_dim);
}

at::Tensor MakeRopeTable(int64_t num_positions, std::span<const float> inverse_frequencies,
                         float scale) {
  const auto half = std::ssize(inverse_frequencies);
  at::Tensor table = at::empty({num_positions, 2, half}, at::kFloat);
  float* data = F32(table);
  ParallelFor(0, num_positions, 256, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<float>(p) * inverse_frequencies[i];
        data[(p * 2) * half + i] = static_cast<float>(std::cos(angle)) * scale;
        data[(p * 2 + 1) * half + i] = static_cast<float>(std::sin(angle)) * scale;
      }
    }
  });
  return table;
}

}  // namespace detour::ops
