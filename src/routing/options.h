// Typed options of routing methods: each method lists its own, with default and range, and every
// fault of a config is reported at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "core/json.h"

namespace detour::routing {

/// One key of a `routing` object. The type is that of `fallback`: boolean, integer, number, string.
struct Option {
  std::string key;
  Json fallback;                     ///< value if the key is absent
  double low = 0, high = 0;          ///< allowed range of a number
  std::vector<std::string> choices;  ///< allowed strings
  std::string help;
};

Option FlagOption(std::string key, bool fallback, std::string help);
Option IntOption(std::string key, int64_t fallback, double low, double high, std::string help);
Option NumberOption(std::string key, double fallback, double low, double high, std::string help);
Option ChoiceOption(std::string key, std::string fallback, std::vector<std::string> choices,
                    std::string help);
/// Replaces the default of `key` (CHECKs that it is there): a method's own among shared options.
void SetDefault(std::vector<Option>* options, const std::string& key, Json fallback);

/// Values for all options: those of `given` (an object, other keys included) checked, the others by
/// default. What is wrong goes to `faults`, one text each, with the allowed range. Keys in `others`
/// are known to somebody else.
Json ResolveOptions(const std::vector<Option>& options, const Json& given,
                    const std::vector<std::string>& others, std::vector<std::string>* faults);

/// The `routing` object of config.json (or one of its list).
struct RoutingConfig {
  bool of_family = false;  ///< implied by the model's type, not written as routing
  std::string method = "dense";
  std::vector<int32_t> layers;    ///< routed layers, ascending
  Json options = Json::object();  ///< every option of the method, resolved

  bool Flag(const char* key) const { return options.at(key).get<bool>(); }
  int64_t Int(const char* key) const { return options.at(key).get<int64_t>(); }
  double Number(const char* key) const { return options.at(key).get<double>(); }
  const std::string& Text(const char* key) const {
    return options.at(key).get_ref<const std::string&>();
  }
  /// Options that not every method has.
  double NumberOr(const char* key, double fallback) const {
    return options.contains(key) ? Number(key) : fallback;
  }
  std::string TextOr(const char* key, const char* fallback) const {
    return options.contains(key) ? Text(key) : fallback;
  }
  /// Whether its routers decide, rather than a control (controls.h).
  bool Learned() const { return TextOr("decider", "learned") == "learned"; }
  bool HasLayer(int32_t layer) const {
    return std::binary_search(layers.begin(), layers.end(), layer);
  }
};

}  // namespace detour::routing
