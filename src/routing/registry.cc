#include "routing/registry.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <iterator>

#include "core/error.h"
#include "routing/dtrnet.h"

namespace detour::routing {

namespace {

constexpr Method kMethods[] = {
    {"dense", "every token attends in every layer", nullptr},
    {"dtrnet", "a two-way softmax gate: attend, or take the value path (arXiv 2509.00925)",
     MakeDtrnetRouter},
};

}  // namespace

std::span<const Method> Methods() { return kMethods; }

const Method& FindMethod(const std::string& name) {
  std::vector<std::string> names;
  for (const Method& m : kMethods) {
    if (name == m.name) return m;
    names.push_back(m.name);
  }
  Fail("config.routing", "method: expected one of {}, got \"{}\"", fmt::join(names, ", "), name);
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
  } else {
    const char* p = layout.data();
    const char* const end = p + layout.size();
    do {
      int32_t l = -1;
      const auto [next, error] = std::from_chars(p, end, l);
      if (error != std::errc() || l < 0 || l >= num_layers ||
          (!layers.empty() && l <= layers.back()) || (next != end && *next != ',')) {
        Fail("config.layout",
             "expected bilayer, bilayer_dense_ends, trilayer, all, or ascending layers below {} "
             "such as 1,3,5; got \"{}\"",
             num_layers, layout);
      }
      layers.push_back(l);
      if (next == end) break;
      p = next + 1;
    } while (true);
  }
  return layers;
}

}  // namespace detour::routing
