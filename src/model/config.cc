#include "model/config.h"

#include <algorithm>
#include <map>
#include <set>

#include "core/error.h"
#include "routing/registry.h"

namespace detour::model {

std::string MethodName(const ModelConfig& config) {
  std::string name;
  for (const routing::RoutingConfig& r : config.routing) {
    name += (name.empty() ? "" : "+") + r.method;
  }
  return name.empty() ? "dense" : name;
}

std::vector<int32_t> RoutedLayers(const ModelConfig& config) {
  std::set<int32_t> layers;
  for (const routing::RoutingConfig& r : config.routing) {
    layers.insert(r.layers.begin(), r.layers.end());
  }
  return {layers.begin(), layers.end()};
}

bool HasRouter(const ModelConfig& config, int32_t layer, routing::Site site) {
  for (const routing::RoutingConfig& r : config.routing) {
    const std::vector<routing::Site>& sites = routing::FindMethod(r.method).sites;
    if (r.HasLayer(layer) && std::find(sites.begin(), sites.end(), site) != sites.end()) {
      return true;
    }
  }
  return false;
}

std::vector<RouterId> Routers(const ModelConfig& config) {
  std::vector<RouterId> routers;
  for (int32_t l : RoutedLayers(config)) {
    bool first = true;
    for (const auto site : {routing::Site::kLayer, routing::Site::kMixer, routing::Site::kFfn}) {
      if (!HasRouter(config, l, site)) continue;
      routers.push_back({l, site,
                         first ? fmt::format("layer{}", l)
                               : fmt::format("layer{}.{}", l, routing::SiteName(site))});
      first = false;
    }
  }
  return routers;
}

int64_t SlidingWindow(const ModelConfig& config, int32_t layer) {
  return !config.slides.empty() && config.slides[layer] ? config.sliding_window : 0;
}

MlpShape MlpShapeOf(const ModelConfig& config, int32_t layer) {
  MlpShape shape{.size = config.intermediate_size};
  for (const routing::RoutingConfig& r : config.routing) {
    if (!r.HasLayer(layer) || !r.options.contains("experts")) continue;
    const auto size = [&](const char* key) {
      return r.Int(key) > 0 ? r.Int(key) : config.intermediate_size;
    };
    shape = {r.Int("experts"), size("expert_size"),
             r.Flag("shared_expert") ? size("shared_size") : 0, r.Flag("shared_gate")};
  }
  return shape;
}

int32_t WeightsLayer(const ModelConfig& config, int32_t layer) {
  for (const routing::RoutingConfig& r : config.routing) {
    const auto weights_layer = routing::FindMethod(r.method).weights_layer;
    if (weights_layer && r.HasLayer(layer)) return weights_layer(r, layer);
  }
  return layer;
}

routing::Shape RouterShape(const ModelConfig& c) {
  return {c.hidden_size, c.vocab_size, c.num_layers, c.rms_norm_eps, c.num_heads};
}

void CheckRouting(const ModelConfig& config, const std::string& name) {
  for (const routing::RoutingConfig& r : config.routing) {
    for (const int32_t l : r.layers) {
      if (SlidingWindow(config, l) > 0 &&
          routing::FindMethod(r.method).sites[0] != routing::Site::kFfn) {
        Fail("config",
             "{}: routing: layer {} attends in a window of {} tokens: {} works on layers with full "
             "attention. Hint: other layers, or no sliding_window",
             name, l, config.sliding_window, r.method);
      }
    }
  }
  std::map<std::pair<int32_t, routing::Site>, std::string> taken;
  for (const routing::RoutingConfig& r : config.routing) {
    for (const routing::Site site : routing::FindMethod(r.method).sites) {
      for (const int32_t l : r.layers) {
        const auto [it, added] = taken.emplace(std::pair(l, site), r.method);
        if (!added) {
          Fail("config", "{}: routing: {} and {} both decide for the {} of layer {}", name,
               it->second, r.method, routing::SiteName(site), l);
        }
      }
    }
  }
  for (int32_t l = 0; l < config.num_layers; ++l) {
    const int32_t source = WeightsLayer(config, l);
    for (const routing::RoutingConfig& r : config.routing) {
      if (source != l && r.options.contains("experts") && (r.HasLayer(l) || r.HasLayer(source))) {
        Fail("config",
             "{}: routing: layer {} uses the weights of layer {}, which experts of {} are no part "
             "of. Hint: {} on other layers",
             name, l, source, r.method, r.method);
      }
    }
  }
  for (const routing::RoutingConfig& r : config.routing) {
    const bool asks = r.TextOr("estimator", "").ends_with("ste") &&
                      routing::FindMethod(r.method).sites[0] == routing::Site::kLayer;
    for (const int32_t l : r.layers) {
      if (asks &&
          (taken.count({l, routing::Site::kMixer}) || taken.count({l, routing::Site::kFfn}))) {
        Fail("config",
             "{}: routing: {} with estimator {} asks what rows left out would have got from layer "
             "{}, which another method's router would have to decide. Hint: estimator prob_gate or "
             "soft, or other layers",
             name, r.method, r.Text("estimator"), l);
      }
    }
  }
}

}  // namespace detour::model
