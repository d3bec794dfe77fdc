// The table of methods. Adding one: its file pair and test, one line in registry.cc.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

struct Method {
  const char* name;
  const char* summary;
  const char* layout;       ///< where routers go unless the config says
  std::vector<Site> sites;  ///< what its routers govern
  std::vector<Option> (*options)();
  /// Adds what is wrong with options that are right one by one; null: nothing can be.
  void (*check)(const RoutingConfig& config, std::vector<std::string>* faults);
  /// The routers of layer `layer`, weights allocated and not yet initialised.
  std::vector<std::unique_ptr<Router>> (*make)(const RoutingConfig& config, const Shape& shape,
                                               int32_t layer);
  /// Weight of the loss of the state after each layer, summing to 1, at `step` of `total_steps`;
  /// null: the method trains on the last state only and has no exits.
  std::vector<double> (*exit_weights)(const RoutingConfig& config, int32_t num_layers, int64_t step,
                                      int64_t total_steps) = nullptr;
  /// The layer whose attention, MLP and norms a layer of the method uses; null: its own.
  int32_t (*weights_layer)(const RoutingConfig& config, int32_t layer) = nullptr;
};

/// All methods but "dense", which is the absence of one.
std::span<const Method> Methods();
/// Error("config.routing") for an unknown name, listing the known ones.
const Method& FindMethod(const std::string& name);

/// Routed layers of a layout name for L layers: "bilayer" 1,3,…,L−1 · "bilayer_dense_ends"
/// 2,4,…,L−2 · "trilayer" all but 0,3,6,… · "all" · "all_but_two" 2,3,…,L−1 · "middle" 1,2,…,L−2 ·
/// or a list "1,3,5". Error("config.layout") otherwise.
std::vector<int32_t> LayoutLayers(const std::string& layout, int32_t num_layers);

/// One `routing` object of a config.json -> method, layers, resolved options. Error("config") that
/// lists every fault of the object.
RoutingConfig ParseRouting(const Json& object, const std::string& where, int32_t num_layers);
Json RoutingToJson(const RoutingConfig& config);

}  // namespace detour::routing
