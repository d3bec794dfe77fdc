// The table of methods. Adding one: its file pair and test, one line in registry.cc.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "routing/router.h"

namespace detour::routing {

struct Method {
  const char* name;
  const char* summary;
  /// Router of layer `layer` for rows of width `dim`, weights allocated and not yet initialised.
  std::unique_ptr<Router> (*make)(const RoutingConfig& config, int64_t dim, int32_t layer);
};

std::span<const Method> Methods();
/// Error("config.routing") for an unknown name, listing the known ones.
const Method& FindMethod(const std::string& name);

/// Routed layers of a layout name for L layers: "bilayer" 1,3,…,L−1 · "bilayer_dense_ends"
/// 2,4,…,L−2 · "trilayer" all but 0,3,6,… · "all" · or a list "1,3,5". Error("config.layout")
/// otherwise.
std::vector<int32_t> LayoutLayers(const std::string& layout, int32_t num_layers);

}  // namespace detour::routing
