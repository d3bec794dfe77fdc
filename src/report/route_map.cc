// The route map: text as on a page, and under each token a lane per layer, filled where the token
// attended.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "report/html.h"
#include "report/html_parts.h"
#include "report/table.h"

namespace detour::report {
namespace {

constexpr int kTextHeight =
    22;  ///< of the token's text above its lanes, in CSS pixels; .t b in the style sheet
constexpr int kLineGap = 12;  ///< below the lanes; .t in the style sheet

struct Lanes {
  int cell, count;
  int pitch() const { return cell + 1; }
  int height() const { return count * pitch() - 1; }
};

/// "M0 y h1 v c h-1 z" for each chosen lane; the viewBox is one unit wide and stretched to the
/// token's text.
/// `inset` leaves that much of the cell free above and below.
template <typename Choose>
std::string LanePath(const char* css, const Lanes& lanes, int inset, const Choose& choose) {
  std::string d;
  for (int l = 0; l < lanes.count; ++l) {
    if (choose(l))
      d += fmt::format("M0 {}h1v{}h-1z", l * lanes.pitch() + inset, lanes.cell - 2 * inset);
  }
  return d.empty() ? "" : fmt::format("<path class=\"{}\" d=\"{}\"/>", css, d);
}

/// Layer names left of every line of text: an SVG pattern as high as a line, repeated over the
/// whole height.
std::string Gutter(const RouteMap& map, const Lanes& lanes, int id) {
  const int line = kTextHeight + lanes.height() + kLineGap;
  std::string labels;
  int free_from = 0;
  for (int l = 0; l < lanes.count; ++l) {
    const int middle = kTextHeight + l * lanes.pitch() + lanes.cell / 2;
    if (middle < free_from) continue;
    const std::string& name = map.layer_names[l];
    labels += fmt::format("<text class=\"lane\" x=\"22\" y=\"{}\">{}</text>", middle + 3,
                          EscapeHtml(DisplayWidth(name) <= 4 ? name : fmt::format("{}", l)));
    free_from = middle + 9;
  }
  return fmt::format(
      "<svg class=\"gutter\" aria-hidden=\"true\"><defs><pattern id=\"lanes{0}\" width=\"26\" "
      "height=\"{1}\" patternUnits=\"userSpaceOnUse\">{2}</pattern></defs>"
      "<rect width=\"26\" height=\"100%\" fill=\"url(#lanes{0})\"/></svg>",
      id, line, labels);
}

bool StartsWord(std::string_view token) {
  return token.empty() || token[0] == ' ' || token[0] == '\n' || token[0] == '\t';
}

nlohmann::ordered_json HoverData(const RouteMap& map) {
  const size_t num_tokens = map.tokens.size();
  nlohmann::ordered_json data;
  data["first"] = map.first_position;
  data["layers"] = map.layer_names;
  auto& routed = data["routed"] = nlohmann::ordered_json::array();
  auto& p = data["p"] = nlohmann::ordered_json::array();
  for (size_t l = 0; l < map.layer_names.size(); ++l) {
    if (map.kinds[l] == LayerKind::kDense) {
      routed.push_back(nullptr);
      p.push_back(nullptr);
      continue;
    }
    std::string bits;
    std::vector<int> per_mille;
    for (size_t t = l * num_tokens; t < (l + 1) * num_tokens; ++t) {
      bits += map.routed[t] ? '1' : '0';
      per_mille.push_back(std::isfinite(map.p[t])
                              ? static_cast<int>(std::lround(1000 * std::clamp(map.p[t], 0.f, 1.f)))
                              : -1);
    }
    routed.push_back(bits);
    p.push_back(per_mille);
  }
  return data;
}

}  // namespace

std::string RouteMapHtml(const RouteMap& map, int id) {
  const size_t num_tokens = map.tokens.size(), num_layers = map.layer_names.size();
  DETOUR_CHECK(num_layers > 0 && map.kinds.size() == num_layers &&
                   map.routed.size() == num_layers * num_tokens &&
                   map.p.size() == num_layers * num_tokens,
               "{} layers, {} kinds, {} tokens, {} routed, {} p", num_layers, map.kinds.size(),
               num_tokens, map.routed.size(), map.p.size());
  const auto num_routed_layers =
      static_cast<double>(std::count(map.kinds.begin(), map.kinds.end(), LayerKind::kRouted));
  const Lanes lanes{std::clamp(64 / static_cast<int>(num_layers), 3, 8),
                    static_cast<int>(num_layers)};

  std::string out =
      "<div class=\"legend\"><span><i class=\"sw on\"></i>attends</span>"
      "<span><i class=\"sw off\"></i>bypasses attention</span>";
  if (num_routed_layers < static_cast<double>(num_layers)) {
    out += "<span><i class=\"rail\"></i>dense layer: every token attends</span>";
  }
  out +=
      "<span><i class=\"ramp\"></i>shade of the text: share of routed layers, none to all</span>"
      "</div>\n";
  out += fmt::format("<div class=\"map\" style=\"--lanes:{}px\">{}<div class=\"flow\">",
                     lanes.height(), Gutter(map, lanes, id));
  size_t word_bytes = 0;
  bool in_word = false;
  const auto end_word = [&] {
    if (in_word) out += "</span>";
    in_word = false;
    word_bytes = 0;
  };
  for (size_t t = 0; t < num_tokens; ++t) {
    const std::string& token = map.tokens[t];
    const std::string text = VisibleToken(token);
    // A word longer than a phone's line may break between its tokens.
    constexpr size_t kMaxWordBytes = 24;
    if (StartsWord(token) || word_bytes + text.size() > kMaxWordBytes) end_word();
    if (!in_word) out += "<span class=\"w\">";
    in_word = true;
    word_bytes += text.size();
    const auto attends = [&](int l) { return map.routed[l * num_tokens + t] != 0; };
    const auto is_routed = [&](int l) { return map.kinds[l] == LayerKind::kRouted; };
    int num_attended = 0;
    for (int l = 0; l < lanes.count; ++l) num_attended += is_routed(l) && attends(l);
    out += fmt::format(
        "<span class=\"t\" data-i=\"{}\" style=\"--a:{:.2g}\"><b>{}</b>"
        "<svg viewBox=\"0 0 1 {}\" preserveAspectRatio=\"none\">{}{}{}</svg></span>",
        t, num_routed_layers > 0 ? num_attended / num_routed_layers : 0.0, EscapeHtml(text),
        lanes.height(),
        LanePath("dense", lanes, lanes.cell / 3, [&](int l) { return !is_routed(l); }),
        LanePath("on", lanes, 0, [&](int l) { return is_routed(l) && attends(l); }),
        LanePath("off", lanes, 0, [&](int l) { return is_routed(l) && !attends(l); }));
    if (token.find('\n') != std::string::npos) {
      end_word();
      out += "<br>";
    }
  }
  end_word();
  return out + "</div></div>\n" + JsonBlock(HoverData(map));
}

}  // namespace detour::report
