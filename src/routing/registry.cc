#include "routing/registry.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <iterator>

#include "core/error.h"
#include "routing/blocks.h"
#include "routing/dllm.h"
#include "routing/dtrnet.h"
#include "routing/early_exit.h"
#include "routing/gate.h"
#include "routing/mod.h"
#include "routing/moe.h"
#include "routing/recursion.h"
#include "routing/skip.h"

namespace detour::routing {

namespace {

const Method kMethods[] = {
    {"dtrnet",
     "a two-way softmax gate: attend, or take the value path (arXiv 2509.00925)",
     "bilayer",
     {Site::kMixer},
     DtrnetOptions,
     CheckGate,
     MakeDtrnet},
    {"mod",
     "the tokens of highest score take the layer (Mixture-of-Depths, arXiv 2404.02258)",
     "bilayer",
     {Site::kLayer},
     ModOptions,
     nullptr,
     MakeMod},
    {"dllm",
     "a hard gate per token and layer, skipped keys evicted (D-LLM, NeurIPS 2024)",
     "all_but_two",
     {Site::kLayer},
     DllmOptions,
     CheckLayerGate,
     MakeDllm},
    {"early_exit",
     "layer dropout and a loss at every exit (LayerSkip, arXiv 2404.16710)",
     "all",
     {Site::kLayer},
     EarlyExitOptions,
     nullptr,
     MakeEarlyExit,
     ExitWeights},
    {"blocks",
     "each head sees its own block of keys and the best earlier ones (MoBA, arXiv 2502.13189)",
     "all",
     {Site::kMixer},
     BlocksOptions,
     CheckBlocks,
     MakeBlocks},
    {"moe",
     "each token takes the MLPs of a few experts (Switch, Mixtral)",
     "all",
     {Site::kFfn},
     MoeOptions,
     CheckMoe,
     MakeMoe},
    {"recursion",
     "a stack of layers run several times, each token as often as it needs (arXiv 2507.10524)",
     "middle",
     {Site::kLayer},
     RecursionOptions,
     CheckRecursion,
     MakeRecursion,
     nullptr,
     RecursionWeightsLayer},
    {"skip",
     "attention and MLP skipped by a gate each (SkipGPT)",
     "all",
     {Site::kMixer, Site::kFfn},
     SkipOptions,
     CheckGate,
     MakeSkip},
};

}  // namespace

std::span<const Method> Methods() { return kMethods; }

const Method& FindMethod(const std::string& name) {
  std::vector<std::string> names = {"dense"};
  for (const Method& m : kMethods) {
    if (name == m.name) return m;
    names.push_back(m.name);
  }
  Fail("config.routing", "method: expected one of {}, got \"{}\"", fmt::join(names, ", "),
       Printable(name));
}

std::vector<int32_t> LayoutLayers(const std::string& layout, int32_t num_layers) {
  std::vector<int32_t> layers;
  const auto add_if = [&](auto&& routed) {
    for (int32_t l = 0; l < num_layers; ++l) {
      if (routed(l)) layers.push_back(l);
    }
  };
  if (layout == "bilayer") {
    add_if([](int32_t l) { return l % 2 == 1; });
  } else if (layout == "bilayer_dense_ends") {
    add_if([&](int32_t l) { return l % 2 == 0 && l >= 2 && l <= num_layers - 2; });
  } else if (layout == "trilayer") {
    add_if([](int32_t l) { return l % 3 != 0; });
  } else if (layout == "all") {
    add_if([](int32_t) { return true; });
  } else if (layout == "all_but_two") {
    add_if([](int32_t l) { return l >= 2; });
  } else if (layout == "middle") {
    add_if([&](int32_t l) { return l >= 1 && l <= num_layers - 2; });
  } else {
    const char* p = layout.data();
    const char* const end = p + layout.size();
    do {
      int32_t l = -1;
      const auto [next, error] = std::from_chars(p, end, l);
      if (error != std::errc() || l < 0 || l >= num_layers ||
          (!layers.empty() && l <= layers.back()) || (next != end && *next != ',')) {
        Fail("config.layout",
             "expected bilayer, bilayer_dense_ends, trilayer, all, all_but_two, middle, or "
             "ascending "
             "layers below {} such as 1,3,5; got \"{}\"",
             num_layers, layout);
      }
      layers.push_back(l);
      if (next == end) break;
      p = next + 1;
    } while (true);
  }
  return layers;
}

namespace {

/// The object's `layers` or `layout`, or the method's own.
std::vector<int32_t> ParseLayers(const Json& object, const std::string& where, const Method& method,
                                 int32_t num_layers) {
  if (!HasKey(object, "layers", where)) {
    return LayoutLayers(GetStringOr(object, "layout", where, method.layout), num_layers);
  }
  if (HasKey(object, "layout", where)) Fail("config", "expected layers or layout, got both");
  std::vector<int32_t> layers;
  for (int64_t l : GetInts(object, "layers", where, 0, num_layers - 1)) {
    if (!layers.empty() && l <= layers.back()) {
      Fail("config", "layers: expected ascending layers, got {} after {}", l, layers.back());
    }
    layers.push_back(static_cast<int32_t>(l));
  }
  return layers;
}

}  // namespace

RoutingConfig ParseRouting(const Json& object, const std::string& where, int32_t num_layers) {
  RoutingConfig config;
  config.method = GetString(object, "method", where);
  if (config.method == "dense") {
    if (object.size() > 1) Fail("config", "{}: method \"dense\" has no other keys", where);
    return config;
  }
  const Method& method = FindMethod(config.method);
  std::vector<std::string> faults;
  config.options =
      ResolveOptions(method.options(), object, {"method", "layers", "layout"}, &faults);
  try {
    config.layers = ParseLayers(object, where, method, num_layers);
  } catch (const Error& error) {
    faults.push_back(error.what());
  }
  if (faults.empty() && method.check) method.check(config, &faults);
  if (!faults.empty()) Fail("config", "{}: {}", where, fmt::join(faults, "; "));
  return config;
}

Json RoutingToJson(const RoutingConfig& config) {
  Json json = {{"method", config.method}, {"layers", config.layers}};
  for (const auto& [key, value] : config.options.items()) json[key] = value;
  return json;
}

}  // namespace detour::routing
