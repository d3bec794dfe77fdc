// Walks the layers: decide, mix, feed forward; with activation checkpointing if asked.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "core/error.h"
#include "model/model.h"
#include "ops/rows.h"

namespace detour::model {

using routing::LayerPlans;
using routing::Mode;
using routing::Plan;
using routing::Site;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

/// The tensors of a layer's plans that carry gradient to what happens outside the layer.
std::vector<at::Tensor*> Carried(LayerPlans& plans) {
  std::vector<at::Tensor*> tensors;
  for (Plan* plan : {&plans.layer, &plans.mixer, &plans.ffn}) {
    for (at::Tensor* t : {&plan->gate_N, &plan->scores_NC, &plan->choice_NE, &plan->span_weight_N,
                          &plan->penalty}) {
      if (t->defined()) tensors.push_back(t);
    }
  }
  return tensors;
}

/// A layer as a function: x -> {x', Carried}.
using LayerFn = std::function<variable_list(const at::Tensor& x_ND)>;

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
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grads[i]);
    }
    torch::autograd::backward(roots, root_grads);
    return {x.grad(), at::Tensor(), at::Tensor()};
  }
};

/// `fallback_share` of the method that decides for the mixer of this layer; 0 for controls, which
/// learn nothing from rows drawn and mean nobody when they take nobody.
double FallbackShare(const ModelConfig& config, int32_t l) {
  for (const routing::RoutingConfig& r : config.routing) {
    const double share = r.Learned() && r.HasLayer(l) ? r.NumberOr("fallback_share", 0) : 0;
    if (share > 0) return share;
  }
  return 0;
}

using StreamPtr = std::shared_ptr<const routing::Stream>;
using PlansPtr = std::shared_ptr<std::vector<LayerPlans>>;

at::Tensor RunOne(const Model& model, int32_t l, const at::Tensor& x_ND, const StreamPtr& stream,
                  const ForwardOptions& options, LayerPlans* plans) {
  const auto decide = [&](Site site, const routing::Taps& taps) {
    return Decide(model, l, site, taps, options);
  };
  return RunLayer(model, model.layers[l], x_ND, *stream, decide,
                  options.caches ? (*options.caches)[l] : nullptr, plans);
}

/// RunOne under activation checkpointing: the first run decides and records, the second replays the
/// record, which all layers share. The model outlives the backward pass.
at::Tensor RunCheckpointed(const Model& model, int32_t l, const at::Tensor& x_ND,
                           const StreamPtr& stream, const ForwardOptions& options,
                           LayerPlans* plans, const PlansPtr& recorded) {
  const auto run = [&model, l, stream](const at::Tensor& x, const ForwardOptions& o,
                                       LayerPlans* taken) {
    variable_list outputs = {RunOne(model, l, x, stream, o, taken)};
    for (at::Tensor* t : Carried(*taken)) outputs.push_back(*t);
    return outputs;
  };
  const LayerFn first = [&](const at::Tensor& x) {
    variable_list outputs = run(x, options, plans);
    (*recorded)[l] = *plans;
    return outputs;
  };
  ForwardOptions again = options;
  again.replay = again.plans = recorded.get();
  LayerFn second = [run, recorded, again](const at::Tensor& x) {
    LayerPlans replayed;
    return run(x, again, &replayed);
  };
  const variable_list outputs = CheckpointFn::apply(x_ND, std::move(second), first);
  size_t next = 1;
  for (at::Tensor* t : Carried(*plans)) *t = outputs[next++];
  return outputs[0];
}

/// A layer whose plans are those of rows that exited before it.
at::Tensor RunExited(const Model& model, int32_t l, const at::Tensor& x_ND, const StreamPtr& stream,
                     const ForwardOptions& options, LayerPlans* plans) {
  const LayerPlans exited = *plans;
  const auto decide = [&](Site site, const routing::Taps&) {
    return *routing::PlanOf(exited, site).plan;
  };
  return RunLayer(model, model.layers[l], x_ND, *stream, decide,
                  options.caches ? (*options.caches)[l] : nullptr, plans);
}

/// Rows on their way through a span of several layers.
struct OpenSpan {
  int32_t last = 0;  ///< they leave after this layer
  at::Tensor before_ND, rows, weight_N;
};

/// Opens the spans that begin at layer `l`, whose input was before_ND, and closes those that end
/// there, or all of them after the last layer that runs.
at::Tensor CombineSpans(const Plan& plan, int32_t l, bool is_last, const at::Tensor& before_ND,
                        at::Tensor x_ND, std::vector<OpenSpan>* spans) {
  for (const routing::DeepSpan& s : plan.deep) {
    spans->push_back({l + s.num_layers - 1, before_ND, s.rows, plan.span_weight_N});
  }
  std::vector<OpenSpan> open;
  for (OpenSpan& s : *spans) {
    if (s.last > l && !is_last) {
      open.push_back(std::move(s));
    } else if (s.rows.size(0) > 0) {
      x_ND = ops::ReplaceRows(
          x_ND, s.rows,
          ops::AddScaled(ops::GatherRows(s.before_ND, s.rows), ops::GatherRows(x_ND, s.rows),
                         s.weight_N.index_select(0, s.rows)));
    }
  }
  *spans = std::move(open);
  return x_ND;
}

}  // namespace

Plan Decide(const Model& model, int32_t l, Site site, const routing::Taps& taps,
            const ForwardOptions& options) {
  routing::Router* router = model.layers[l].router(site);
  if (!router) return Plan{};
  if (options.knobs.routed_layers >= 0 && router->num_experts() == 0) {
    const std::vector<int32_t> layers = RoutedLayers(model.config);
    const auto deeper = layers.end() - std::lower_bound(layers.begin(), layers.end(), l);
    if (deeper > options.knobs.routed_layers) return routing::EveryRow(taps.stream.num_rows());
  }
  const Plan* replay = options.replay ? routing::PlanOf((*options.replay)[l], site).plan : nullptr;
  const routing::DecideArgs args{options.mode,  l,      options.draw,
                                 options.knobs, replay, options.plans};
  Plan plan = router->Decide(taps, args);
  const bool nobody = options.mode == Mode::kTrain && !replay && site == Site::kMixer &&
                      plan.num_rows > 0 && plan.NumRouted() == 0;
  if (const double share = nobody ? FallbackShare(model.config, l) : 0; share > 0) {
    // Scores stay, rows change: a replay of the drawn rows gives their weights.
    SetRows(DrawFallbackRows(options.draw, l, taps.stream, share), &plan);
    routing::DecideArgs drawn = args;
    drawn.replay = &plan;
    return router->Decide(taps, drawn);
  }
  return plan;
}

at::Tensor Forward(const Model& model, const at::Tensor& ids_N, const routing::Stream& stream,
                   const ForwardOptions& options) {
  DETOUR_CHECK(ids_N.size(0) == stream.num_rows());
  auto with_ids = std::make_shared<routing::Stream>(stream);
  with_ids->ids_N = ids_N;
  at::Tensor x_ND = options.input_ND.defined() ? options.input_ND : EmbedTokens(model, ids_N);
  std::vector<LayerPlans> ignored;
  std::vector<LayerPlans>& plans = options.plans ? *options.plans : ignored;
  plans.resize(options.first_layer);
  plans.resize(model.layers.size());
  ForwardOptions own = options;
  own.plans = &plans;
  const PlansPtr recorded =
      options.checkpoint ? std::make_shared<std::vector<LayerPlans>>(plans.size()) : nullptr;
  const int32_t num_layers = options.num_layers >= 0 ? options.num_layers : model.config.num_layers;
  const bool exits = options.exit.kind != ExitRule::Kind::kNone;
  ExitState exit(stream.num_rows());
  std::vector<OpenSpan> spans;
  for (int32_t l = options.first_layer; l < num_layers; ++l) {
    // Autograd records no function of inputs without gradient: below the first layer that learns
    // there is nothing to recompute, and that layer itself keeps what it needs.
    const bool recompute = options.checkpoint && x_ND.requires_grad();
    if (exits) plans[l] = exit.Plans();
    const at::Tensor before = x_ND;
    if (exits) {
      x_ND = RunExited(model, l, x_ND, with_ids, own, &plans[l]);
    } else if (recompute) {
      x_ND = RunCheckpointed(model, l, x_ND, with_ids, own, &plans[l], recorded);
    } else {
      x_ND = RunOne(model, l, x_ND, with_ids, own, &plans[l]);
      if (recorded) (*recorded)[l] = plans[l];
    }
    x_ND = CombineSpans(plans[l].layer, l, l + 1 == num_layers, before, x_ND, &spans);
    if (exits) exit.Update(model, options.exit, l, before, x_ND);
    if (options.states) options.states->push_back(x_ND);
  }
  return ops::RmsNorm(x_ND, model.norm, model.config.rms_norm_eps);
}

at::Tensor Logits(const Model& model, const at::Tensor& h_ND) {
  return ops::Linear(h_ND, model.head);
}

}  // namespace detour::model
