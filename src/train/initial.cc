// The model that a run starts from: new, read, or a dense one with routers added.
#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <map>
#include <set>

#include "core/error.h"
#include "routing/registry.h"
#include "train/config.h"

namespace detour::train {

namespace {

using Tensors = std::map<std::string, at::Tensor>;

/// Experts that start as copies of the dense model's MLP, so that weights that sum to 1 give what
/// it gave (sparse upcycling, arXiv 2212.05055). Beside a shared expert, which is the MLP itself,
/// they start with nothing to add. False if `name` is no weight of an expert, or none of that size.
bool CopyExpert(const std::string& name, const Tensors& dense, bool shared, at::Tensor& t) {
  static constexpr std::pair<const char*, const char*> kParts[] = {
      {".w1.weight", "gate_proj"}, {".w2.weight", "down_proj"}, {".w3.weight", "up_proj"}};
  const std::string kExperts = "block_sparse_moe.experts.";
  const size_t at = name.find(kExperts);
  if (at == std::string::npos) return false;
  for (const auto& [ours, mlp] : kParts) {
    if (!name.ends_with(ours)) continue;
    const auto source = dense.find(name.substr(0, at) + "mlp." + mlp + ".weight");
    if (source == dense.end() || source->second.sizes() != t.sizes()) return false;
    t.copy_(source->second);
    if (shared && std::string_view(ours) == ".w2.weight") t.zero_();
    return true;
  }
  return false;
}

/// Into `model` every weight of the dense model in DIR that has the same name; experts are made of
/// its MLPs, and only routers may be left.
void LoadAllButRouters(const std::string& dir, model::Model& model) {
  model::Model source = model::LoadModel(dir);
  Tensors dense;
  ForEachTensor(source, [&](const std::string& name, at::Tensor& t) { dense[name] = t; });
  std::set<std::string> routers, unused;
  for (const auto& [name, t] : dense) unused.insert(name);
  for (size_t l = 0; l < model.layers.size(); ++l) {
    ForEachRouterTensor(model.layers[l], [&](const std::string& name, at::Tensor&) {
      routers.insert(fmt::format("model.layers.{}.{}", l, name));
    });
    if (model.layers[l].experts.empty()) continue;
    for (const char* part : {"gate_proj", "up_proj", "down_proj"}) {
      unused.erase(fmt::format("model.layers.{}.mlp.{}.weight", l, part));
    }
  }
  const std::string method = MethodName(model.config);
  bool shared = false;
  for (const routing::RoutingConfig& r : model.config.routing) {
    shared |= r.options.contains("shared_expert") && r.Flag("shared_expert");
  }
  ForEachTensor(model, [&](const std::string& name, at::Tensor& t) {
    const auto it = dense.find(name);
    if (it != dense.end() && it->second.sizes() == t.sizes()) {
      t.copy_(it->second);
      unused.erase(name);
    } else if (!CopyExpert(name, dense, shared, t) && routers.count(name) == 0) {
      Fail("train.config",
           "--init-from {}: method {} needs {} of shape [{}], which the dense model has not", dir,
           method, name, fmt::join(t.sizes(), ","));
    }
  });
  if (!unused.empty()) {
    Fail("train.config", "--init-from {}: method {} has no place for {}", dir, method,
         *unused.begin());
  }
}

}  // namespace

model::Model InitialModel(const TrainConfig& c) {
  const model::ModelConfig config = ResolveModelConfig(c);
  if (!c.init_from.empty() && !HasNewRouters(c, config)) {
    model::Model m = model::LoadModel(c.init_from);
    m.config = config;
    return m;
  }
  model::Model m = model::AllocateModel(config);
  model::InitializeWeights(m, c.seed);
  if (!c.init_from.empty()) LoadAllButRouters(c.init_from, m);
  return m;
}

}  // namespace detour::train
