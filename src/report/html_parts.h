// What the parts of the HTML page share; not for other folders.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "report/html.h"

namespace detour::report {

using Points = std::vector<std::pair<double, double>>;

/// At most 1000 points that keep a line's extremes and gaps: the smallest and largest of each of
/// 500 buckets.
Points Decimate(const Series& series);

inline constexpr int kPaletteSize = 6;
inline int PaletteIndex(int color, size_t place) {
  return static_cast<int>(color >= 0 ? color : place) % kPaletteSize;
}

/// One value as its axis would write it.
std::string FormatStyled(double value, NumberStyle style);

/// A JSON block for the page's script, safe inside <script> whatever its strings hold.
std::string JsonBlock(const nlohmann::ordered_json& data);

/// A token as one line of visible text: newline, tab and carriage return as signs. Not yet escaped
/// for HTML.
std::string VisibleToken(std::string_view token);

extern const char kPageStyle[];
extern const char kPageScript[];

}  // namespace detour::report
