// Walks the layers: decide, mix, feed forward; with activation checkpointing if asked.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.h"
#include "model/model.h"
#include "ops/rows.h"

namespace detour::model {

using routing::Plan;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

/// A layer as a function: x -> {x', Σ p(attend) if the layer is routed}.
using LayerFn = std::function<variable_list(const at::Tensor& x_ND)>;

variable_list Outputs(const at::Tensor& x_ND, const Plan& plan) {
  if (!plan.budget_sum.defined()) return {x_ND};
  return {x_ND, plan.budget_sum};
}

struct LayerCapsule : torch::CustomClassHolder {
  LayerFn fn;
};

/// Keeps a layer's input only; its backward runs the layer again. Weight gradients go straight to
/// the leaves.
struct CheckpointFn : torch::autograd::Function<CheckpointFn> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, LayerFn fn,
                               const LayerFn& first) {
    ctx->save_for_backward({x});
    auto capsule = c10::make_intrusive<LayerCapsule>();
    capsule->fn = std::move(fn);
    ctx->saved_data["layer"] = c10::IValue::make_capsule(std::move(capsule));
    return first(x);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::AutoGradMode enable(true);
    at::Tensor x = ctx->get_saved_variables()[0].detach().requires_grad_();
    const auto capsule = ctx->saved_data["layer"].toCapsule();
    variable_list outputs = static_cast<LayerCapsule*>(capsule.get())->fn(x);
    variable_list roots, root_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grads[i].defined()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grads[i]);
    }
    torch::autograd::backward(roots, root_grads);
    return {x.grad(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

Plan DecideLayer(const Model& model, int32_t l, const at::Tensor& x_ND,
                 const ForwardOptions& options) {
  const routing::Router* router = model.layers[l].router.get();
  if (!router) return Plan{};
  Plan plan = router->Decide(x_ND, options.mode, options.replay ? &(*options.replay)[l] : nullptr);
  if (options.fallback && !options.replay && !plan.all_routed && plan.rows_R.size(0) == 0) {
    routing::SetRows(routing::DrawFallbackRows(options.draw, l, x_ND.size(0),
                                               model.config.routing.fallback_share),
                     &plan);
  }
  return plan;
}

at::Tensor Forward(const Model& model, const at::Tensor& ids_N, const routing::Stream& stream,
                   const ForwardOptions& options) {
  DETOUR_CHECK(ids_N.size(0) == stream.num_rows());
  at::Tensor x_ND = ops::Embed(model.embed, ids_N);
  if (options.plans) options.plans->assign(model.layers.size(), Plan{});
  for (int32_t l = 0; l < model.config.num_layers; ++l) {
    const LayerWeights& layer = model.layers[l];
    ops::KvStore* store = options.caches ? (*options.caches)[l] : nullptr;
    const auto run = [&model, &layer, &stream, store](const at::Tensor& x, const Plan& plan) {
      return Ffn(model, layer, Mixer(model, layer, x, stream, plan, store));
    };
    Plan plan;
    if (!options.checkpoint) {
      plan = DecideLayer(model, l, x_ND, options);
      x_ND = run(x_ND, plan);
    } else {
      // The first run decides and records; the second replays the record. Stream and model outlive
      // the backward pass.
      auto recorded = std::make_shared<std::vector<Plan>>(model.layers.size());
      const LayerFn first = [&](const at::Tensor& x) -> variable_list {
        plan = DecideLayer(model, l, x, options);
        (*recorded)[l] = plan;
        return Outputs(run(x, plan), plan);
      };
      ForwardOptions again = options;
      again.replay = recorded.get();
      LayerFn second = [&model, l, run, recorded, again](const at::Tensor& x) -> variable_list {
        const Plan replayed = DecideLayer(model, l, x, again);
        return Outputs(run(x, replayed), replayed);
      };
      const variable_list outputs = CheckpointFn::apply(x_ND, std::move(second), first);
      x_ND = outputs[0];
      if (outputs.size() > 1) plan.budget_sum = outputs[1];
    }
    if (options.plans) (*options.plans)[l] = plan;
  }
  return ops::RmsNorm(x_ND, model.norm, model.config.rms_norm_eps);
}

at::Tensor Logits(const Model& model, const at::Tensor& h_ND) {
  return ops::Linear(h_ND, model.head);
}

}  // namespace detour::model
