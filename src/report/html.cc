#include "report/html.h"

#include <fmt/format.h>

#include <cmath>

#include "core/error.h"
#include "report/html_parts.h"
#include "report/table.h"
#include "report/utf8.h"

namespace detour::report {
namespace {

/// Control characters, and those that reorder or hide text.
bool MustBeVisible(uint32_t code) {
  return (code < 0x20 && code != '\n' && code != '\t') || (code >= 0x7F && code < 0xA0) ||
         code == 0x61C || (code >= 0x200B && code <= 0x200F) ||
         (code >= 0x2028 && code <= 0x202E) || (code >= 0x2060 && code <= 0x206F) ||
         code == 0xFEFF || (code >= 0xFFF9 && code <= 0xFFFB) || (code & 0xFFFE) == 0xFFFE ||
         (code >= 0xFDD0 && code <= 0xFDEF);
}

struct LegendEntry {
  std::string name;
  std::string sign;  ///< CSS classes: key (a line), sw (a square), with a colour
};

std::string Legend(const std::vector<LegendEntry>& entries) {
  std::string out = "<div class=\"legend\">";
  for (const LegendEntry& e : entries) {
    out += fmt::format("<span><i class=\"{}\"></i>{}</span>", e.sign, EscapeHtml(e.name));
  }
  return out + "</div>\n";
}

std::string Figure(const char* css, const std::string& title, const std::string& inner,
                   const std::string& note) {
  std::string out = fmt::format("<figure class=\"{}\">\n", css);
  if (!title.empty()) out += fmt::format("<h3>{}</h3>\n", EscapeHtml(title));
  out += inner;
  if (!note.empty()) out += fmt::format("<figcaption>{}</figcaption>\n", EscapeHtml(note));
  return out + "</figure>\n";
}

constexpr int kWide = 860, kNarrow = 360;

const char* StyleName(NumberStyle style) {
  return style == NumberStyle::kPercent ? "percent" : style == NumberStyle::kBytes ? "bytes" : "";
}

}  // namespace

std::string EscapeHtml(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const Utf8Char c = DecodeUtf8(text, at);
    if (!c.valid || (c.code < 0x80 && MustBeVisible(c.code))) {
      out += fmt::format("\\x{:02X}", c.code);
    } else if (MustBeVisible(c.code)) {
      out += fmt::format("\\u{{{:04X}}}", c.code);
    } else if (c.code == '&') {
      out += "&amp;";
    } else if (c.code == '<') {
      out += "&lt;";
    } else if (c.code == '>') {
      out += "&gt;";
    } else if (c.code == '"') {
      out += "&quot;";
    } else if (c.code == '\'') {
      out += "&#39;";
    } else {
      out += text.substr(at, c.length);
    }
    at += c.length;
  }
  return out;
}

std::string VisibleToken(std::string_view token) {
  std::string out;
  for (const char c : token) {
    if (c == '\n') {
      out += "↵";
    } else if (c == '\t') {
      out += "⇥";
    } else if (c == '\r') {
      out += "␍";
    } else {
      out += c;
    }
  }
  return out;
}

std::string FormatStyled(double value, NumberStyle style) {
  if (style == NumberStyle::kPercent) return FormatPercent(value);
  if (style == NumberStyle::kBytes) return FormatBytes(value);
  return std::abs(value) >= 1000 ? FormatCount(value) : fmt::format("{:.4g}", value);
}

std::string JsonBlock(const nlohmann::ordered_json& data) {
  // ensure_ascii; then "<" can't begin a tag or a comment, which is all that ends a script element.
  const std::string json =
      data.dump(-1, ' ', true, nlohmann::ordered_json::error_handler_t::replace);
  std::string out = "<script type=\"application/json\">";
  for (const char c : json) {
    if (c == '<') {
      out += "\\u003c";
    } else {
      out += c;
    }
  }
  return out + "</script>\n";
}

HtmlPage::HtmlPage(std::string title, std::string subtitle)
    : title_(std::move(title)), subtitle_(std::move(subtitle)) {}

void HtmlPage::Heading(std::string_view text) {
  body_ += fmt::format("<h2>{}</h2>\n", EscapeHtml(text));
}

void HtmlPage::Paragraph(std::string_view text) {
  body_ += fmt::format("<p>{}</p>\n", EscapeHtml(text));
}

void HtmlPage::KeyFigures(const std::vector<KeyFigure>& figures) {
  body_ += "<dl class=\"figures\">\n";
  for (const KeyFigure& f : figures) {
    body_ += fmt::format("<div><dt>{}</dt><dd>{}</dd><dd class=\"detail\">{}</dd></div>\n",
                         EscapeHtml(f.label), EscapeHtml(f.value), EscapeHtml(f.detail));
  }
  body_ += "</dl>\n";
}

void HtmlPage::Table(const ComparisonTable& table) {
  // Few columns stay near their row's name.
  std::string inner = fmt::format("<div class=\"scroll{}\"><table>\n<thead><tr><th></th>",
                                  table.columns.size() > 3 ? " full" : "");
  for (const std::string& column : table.columns) {
    inner += fmt::format("<th scope=\"col\">{}</th>", EscapeHtml(column));
  }
  inner += "</tr></thead>\n<tbody>\n";
  for (const auto& row : table.rows) {
    if (row.section) {
      inner +=
          fmt::format("<tr class=\"section\"><th colspan=\"{}\" scope=\"colgroup\">{}</th></tr>\n",
                      table.columns.size() + 1, EscapeHtml(row.metric));
      continue;
    }
    DETOUR_CHECK(row.cells.size() == table.columns.size(), "{}: {} cells for {} columns",
                 row.metric, row.cells.size(), table.columns.size());
    inner += fmt::format("<tr><th scope=\"row\">{}", EscapeHtml(row.metric));
    if (!row.detail.empty()) inner += fmt::format("<small>{}</small>", EscapeHtml(row.detail));
    inner += "</th>";
    for (const std::string& cell : row.cells) inner += fmt::format("<td>{}</td>", EscapeHtml(cell));
    inner += "</tr>\n";
  }
  body_ += Figure("table", table.title, inner + "</tbody></table></div>\n", table.note);
}

void HtmlPage::Chart(const LineChart& chart) {
  std::vector<LegendEntry> entries;
  nlohmann::ordered_json data = {{"x", chart.x_label},
                                 {"xStyle", StyleName(chart.x_style)},
                                 {"yStyle", StyleName(chart.y_style)},
                                 {"log", chart.log_x}};
  auto& series = data["series"] = nlohmann::ordered_json::array();
  for (size_t i = 0; i < chart.series.size(); ++i) {
    const Series& s = chart.series[i];
    const int color = PaletteIndex(s.color, i);
    entries.push_back({s.name, fmt::format("key c{}{}{}", color, s.dashed ? " dashed" : "",
                                           s.faint ? " faint" : "")});
    auto points = nlohmann::ordered_json::array();
    for (const auto& [x, y] : Decimate(s)) {
      if (!std::isfinite(x) || !std::isfinite(y) || (chart.log_x && x <= 0)) continue;
      // Six digits are more than the tooltip shows.
      points.push_back({x, std::stod(fmt::format("{:.6g}", y))});
    }
    series.push_back({{"name", s.name}, {"color", color}, {"points", std::move(points)}});
  }
  body_ += Figure(
      "chart", chart.title,
      Legend(entries) + LineChartSvg(chart, kWide) + LineChartSvg(chart, kNarrow) + JsonBlock(data),
      chart.note);
}

void HtmlPage::Chart(const BarChart& chart) {
  std::vector<LegendEntry> entries;
  for (size_t i = 0; i < chart.series.size(); ++i) {
    entries.push_back(
        {chart.series[i].name, fmt::format("sw c{}", PaletteIndex(chart.series[i].color, i))});
  }
  if (!chart.muted_label.empty()) entries.push_back({chart.muted_label, "sw dense"});
  if (!chart.reference_label.empty()) entries.push_back({chart.reference_label, "key dashed ref"});
  body_ +=
      Figure("chart", chart.title,
             Legend(entries) + BarChartSvg(chart, kWide) + BarChartSvg(chart, kNarrow), chart.note);
}

void HtmlPage::Map(const RouteMap& map) {
  body_ += Figure("routes", map.title, RouteMapHtml(map, num_maps_++), map.note);
}

void HtmlPage::TextSamples(const std::vector<TextSample>& samples) {
  body_ += "<div class=\"samples\">\n";
  for (const TextSample& s : samples) {
    // A newline right after <pre> would be dropped by the parser; the span keeps the text's own.
    body_ += Figure("sample", s.title,
                    fmt::format("<pre><span class=\"prompt\">{}</span>{}</pre>\n",
                                EscapeHtml(s.prompt), EscapeHtml(s.text)),
                    "");
  }
  body_ += "</div>\n";
}

void HtmlPage::Footer(std::string_view text) {
  footer_ += fmt::format("<p>{}</p>\n", EscapeHtml(text));
}

std::string HtmlPage::Render() const {
  std::string out =
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      // Belt and braces for "no external resource": the browser itself refuses to load any.
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src "
      "'unsafe-inline'; script-src 'unsafe-inline'\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<meta name=\"color-scheme\" content=\"light dark\">\n";
  out += fmt::format(
      "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n<main>\n<header>\n<h1>{}</h1>\n",
      EscapeHtml(title_), kPageStyle, EscapeHtml(title_));
  if (!subtitle_.empty())
    out += fmt::format("<p class=\"subtitle\">{}</p>\n", EscapeHtml(subtitle_));
  out += "</header>\n" + body_;
  if (!footer_.empty()) out += "<footer>\n" + footer_ + "</footer>\n";
  return out + "</main>\n<div id=\"tip\" role=\"status\" hidden></div>\n<script>" + kPageScript +
         "</script>\n</body>\n</html>\n";
}

}  // namespace detour::report
