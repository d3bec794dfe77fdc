#include "routing/options.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "core/error.h"

namespace detour::routing {

Option FlagOption(std::string key, bool fallback, std::string help) {
  return {std::move(key), fallback, 0, 0, {}, std::move(help)};
}

Option IntOption(std::string key, int64_t fallback, double low, double high, std::string help) {
  return {std::move(key), fallback, low, high, {}, std::move(help)};
}

Option NumberOption(std::string key, double fallback, double low, double high, std::string help) {
  return {std::move(key), fallback, low, high, {}, std::move(help)};
}

Option ChoiceOption(std::string key, std::string fallback, std::vector<std::string> choices,
                    std::string help) {
  return {std::move(key), std::move(fallback), 0, 0, std::move(choices), std::move(help)};
}

void SetDefault(std::vector<Option>* options, const std::string& key, Json fallback) {
  const auto it =
      std::find_if(options->begin(), options->end(), [&](const Option& o) { return o.key == key; });
  DETOUR_CHECK(it != options->end(), "no option {}", key);
  it->fallback = std::move(fallback);
}

namespace {

/// What is wrong with `value` for `option`, or "".
std::string Fault(const Option& o, const Json& value) {
  const std::string got = Printable(value.dump(-1, ' ', true, Json::error_handler_t::replace));
  if (o.fallback.is_boolean()) {
    return value.is_boolean() ? "" : fmt::format("{}: expected true or false, got {}", o.key, got);
  }
  if (o.fallback.is_string()) {
    if (value.is_string() && std::find(o.choices.begin(), o.choices.end(),
                                       value.get<std::string>()) != o.choices.end()) {
      return "";
    }
    return fmt::format("{}: expected one of {}, got {}", o.key, fmt::join(o.choices, ", "), got);
  }
  const bool integer = o.fallback.is_number_integer();
  const bool right = integer ? value.is_number_integer() : value.is_number();
  if (right && value.get<double>() >= o.low && value.get<double>() <= o.high) return "";
  return fmt::format("{}: expected {} from {} to {}, got {}", o.key,
                     integer ? "an integer" : "a number", o.low, o.high, got);
}

}  // namespace

Json ResolveOptions(const std::vector<Option>& options, const Json& given,
                    const std::vector<std::string>& others, std::vector<std::string>* faults) {
  Json resolved = Json::object();
  std::vector<std::string> keys = others;
  for (const Option& o : options) {
    keys.push_back(o.key);
    resolved[o.key] = o.fallback;
    if (!given.contains(o.key) || given.at(o.key).is_null()) continue;
    const Json& value = given.at(o.key);
    if (std::string fault = Fault(o, value); !fault.empty()) {
      faults->push_back(std::move(fault));
    } else if (o.fallback.is_number_float()) {
      resolved[o.key] = value.get<double>();
    } else {
      resolved[o.key] = value;
    }
  }
  for (const auto& [key, value] : given.items()) {
    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
      faults->push_back(
          fmt::format("{}: unknown key; known: {}", Printable(key), fmt::join(keys, ", ")));
    }
  }
  return resolved;
}

}  // namespace detour::routing
