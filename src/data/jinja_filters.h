// The two tables behind FindFilter.
#pragma once

#include <string_view>
#include <unordered_map>

#include "data/jinja_interpreter.h"

namespace detour::data::jinja {

using FilterTable = std::unordered_map<std::string_view, Native>;

/// Filters of text, numbers and single values.
const FilterTable& ScalarFilters();
/// Filters of what can be walked over.
const FilterTable& SequenceFilters();

}  // namespace detour::data::jinja
