// Line and bar charts as static SVG. Colours and hover come from the page (html_assets.h).
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "core/error.h"
#include "report/html.h"
#include "report/html_parts.h"
#include "report/table.h"

namespace detour::report {
namespace {

/// The rectangle of the data inside the SVG, in its pixels.
struct Plot {
  double left, right, top, bottom;
  int width, height;
};

struct Axis {
  double lo, hi;  ///< of the data; decades if log
  double from_px, to_px;
  bool log = false;
  double Pixel(double value) const {
    if (log) value = std::log10(value);
    return from_px + (value - lo) / (hi - lo) * (to_px - from_px);
  }
};

using Ticks = std::vector<std::pair<double, std::string>>;

/// Ticks in the unit a reader expects (thousands, percent, MiB), all with the same number of
/// decimals.
Ticks LabelledTicks(double lo, double hi, int max_ticks, NumberStyle style) {
  double unit = 1;
  std::string suffix;
  const double largest = std::max(std::abs(lo), std::abs(hi));
  const auto choose = [&](std::initializer_list<std::pair<double, const char*>> units) {
    for (const auto& [size, name] : units) {
      if (largest >= size) {
        unit = size;
        suffix = name;
      }
    }
  };
  if (style == NumberStyle::kPercent) {
    unit = 0.01;
    suffix = "%";
  } else if (style == NumberStyle::kBytes) {
    choose({{1, " B"}, {0x1p10, " KiB"}, {0x1p20, " MiB"}, {0x1p30, " GiB"}, {0x1p40, " TiB"}});
  } else {
    choose({{1e4, "k"}, {1e6, "M"}, {1e9, "B"}, {1e12, "T"}});
  }
  const std::vector<double> values = NiceTicks(lo / unit, hi / unit, max_ticks);
  int decimals = 0;
  const auto is_round = [&](double v) {
    const double scaled = v * std::pow(10, decimals);
    return std::abs(scaled - std::round(scaled)) < 1e-6 * std::max(1.0, std::abs(scaled));
  };
  while (decimals < 9 && !std::all_of(values.begin(), values.end(), is_round)) ++decimals;
  Ticks ticks;
  for (double v : values)
    ticks.emplace_back(v * unit, fmt::format("{:.{}f}{}", v, decimals, suffix));
  return ticks;
}

Ticks LogTicks(double lo_decade, double hi_decade) {
  Ticks ticks;
  const bool dense = hi_decade - lo_decade < 2.5;
  const int first = static_cast<int>(std::floor(lo_decade)), last = static_cast<int>(hi_decade);
  for (int decade = first; decade <= last; ++decade) {
    for (int m : {1, 2, 5}) {
      if (m > 1 && !dense) break;
      const double v = m * std::pow(10.0, decade);
      const double at = std::log10(v);
      if (at < lo_decade - 1e-9 || at > hi_decade + 1e-9) continue;
      ticks.emplace_back(v, v < 1 ? fmt::format("{:g}", v)
                                  : fmt::format("{:g}", v >= 1e9   ? v / 1e9
                                                        : v >= 1e6 ? v / 1e6
                                                        : v >= 1e3 ? v / 1e3
                                                                   : v) +
                                        (v >= 1e9   ? "B"
                                         : v >= 1e6 ? "M"
                                         : v >= 1e3 ? "k"
                                                    : ""));
    }
  }
  return ticks;
}

Plot MakePlot(int width, const Ticks& y_ticks) {
  const bool narrow = width < 500;
  size_t label_chars = 2;
  for (const auto& tick : y_ticks) label_chars = std::max(label_chars, tick.second.size());
  const int height = narrow ? 270 : 330;
  return {
      12 + 7.5 * static_cast<double>(label_chars), width - 14.0, 32, height - 46.0, width, height};
}

std::string OpenSvg(const Plot& plot, std::string_view title, std::string_view geometry) {
  return fmt::format(
      "<svg class=\"{}\" viewBox=\"0 0 {} {}\" width=\"{}\" height=\"{}\" role=\"img\" "
      "aria-label=\"{}\"{}>\n",
      plot.width < 500 ? "narrow" : "wide", plot.width, plot.height, plot.width, plot.height,
      EscapeHtml(title), geometry);
}

/// Horizontal grid, its labels, the y label above it, the baseline and the x label.
std::string Frame(const Plot& plot, const Axis& y, const Ticks& y_ticks, std::string_view x_label,
                  std::string_view y_label) {
  std::string out;
  for (const auto& [value, label] : y_ticks) {
    const double at = y.Pixel(value);
    out += fmt::format(
        "<path class=\"grid\" d=\"M{:.1f} {:.1f}H{:.1f}\"/>"
        "<text class=\"tick end\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n",
        plot.left, at, plot.right, plot.left - 7, at + 4, EscapeHtml(label));
  }
  out += fmt::format("<path class=\"axis\" d=\"M{:.1f} {:.1f}H{:.1f}\"/>\n", plot.left, plot.bottom,
                     plot.right);
  if (!y_label.empty()) {
    out += fmt::format("<text class=\"label\" x=\"0\" y=\"12\">{}</text>\n", EscapeHtml(y_label));
  }
  if (!x_label.empty()) {
    out += fmt::format("<text class=\"label end\" x=\"{:.1f}\" y=\"{}\">{}</text>\n", plot.right,
                       plot.height - 8, EscapeHtml(x_label));
  }
  return out;
}

bool Usable(const LineChart& chart, double x, double y) {
  return std::isfinite(x) && std::isfinite(y) && (!chart.log_x || x > 0);
}

struct Extent {
  double lo = std::numeric_limits<double>::infinity();
  double hi = -std::numeric_limits<double>::infinity();
  void Add(double v) {
    lo = std::min(lo, v);
    hi = std::max(hi, v);
  }
  /// Gives an empty or single-valued extent a width.
  void Widen() {
    if (lo > hi) lo = 0, hi = 1;
    if (lo == hi) {
      const double margin = lo == 0 ? 1 : 0.1 * std::abs(lo);
      lo -= margin, hi += margin;
    }
  }
};

/// An SVG path; a point that can't be drawn breaks the line, a point between two breaks becomes a
/// dot (round line cap).
std::string LinePath(const LineChart& chart, const Points& points, const Axis& x, const Axis& y) {
  std::string d;
  bool pen_down = false, moved_only = false;
  const auto dot = [&] {
    if (moved_only) d += "h0";
  };
  for (const auto& [px, py] : points) {
    if (!Usable(chart, px, py)) {
      dot();
      pen_down = moved_only = false;
      continue;
    }
    d += fmt::format("{}{:.1f} {:.1f}", pen_down ? 'L' : 'M', x.Pixel(px), y.Pixel(py));
    moved_only = !pen_down;
    pen_down = true;
  }
  dot();
  return d;
}

std::string XTicks(const Plot& plot, const Axis& x, const Ticks& ticks) {
  std::string out;
  double free_from = -1e9;
  for (const auto& [value, label] : ticks) {
    const double at = x.Pixel(value);
    const double half = 3.4 * DisplayWidth(label);
    if (!(at >= plot.left - 0.5 && at <= plot.right + 0.5)) continue;
    out += fmt::format("<path class=\"axis\" d=\"M{:.1f} {:.1f}v5\"/>", at, plot.bottom);
    // The last label moves left rather than past the edge; one that would touch its neighbour is
    // left out.
    const double center = std::min(at, plot.width - half - 1);
    if (center - half < free_from) continue;
    out += fmt::format("<text class=\"tick mid\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n", center,
                       plot.bottom + 18, EscapeHtml(label));
    free_from = center + half + 6;
  }
  return out;
}

}  // namespace

std::vector<double> NiceTicks(double lo, double hi, int max_ticks) {
  DETOUR_CHECK(std::isfinite(lo) && std::isfinite(hi) && lo < hi && max_ticks >= 1, "{} {} {}", lo,
               hi, max_ticks);
  const double rough = hi / max_ticks - lo / max_ticks;
  double step = std::pow(10.0, std::floor(std::log10(rough)));
  // The tolerance keeps 0.3 / 3 from being taken for more than 0.1.
  for (const double factor : {1.0, 2.0, 2.5, 5.0, 10.0}) {
    if (step * factor >= rough * (1 - 1e-9)) {
      step *= factor;
      break;
    }
  }
  std::vector<double> ticks;
  const double first = std::ceil(lo / step - 1e-9), last = std::floor(hi / step + 1e-9);
  for (double i = first; i <= last; ++i) ticks.push_back(i == 0 ? 0 : i * step);
  return ticks;
}

Points Decimate(const Series& series) {
  DETOUR_CHECK(series.xs.size() == series.ys.size(), "{} xs, {} ys", series.xs.size(),
               series.ys.size());
  constexpr size_t kBuckets = 500;
  const size_t n = series.xs.size();
  Points points;
  const auto add = [&](size_t i) { points.emplace_back(series.xs[i], series.ys[i]); };
  if (n <= 2 * kBuckets) {
    for (size_t i = 0; i < n; ++i) add(i);
    return points;
  }
  for (size_t b = 0; b < kBuckets; ++b) {
    const size_t begin = b * n / kBuckets, end = (b + 1) * n / kBuckets;
    size_t low = begin, high = begin;
    for (size_t i = begin; i < end; ++i) {
      // A gap must stay a gap: comparisons with NaN are false, so it is looked for by itself.
      if (!std::isfinite(series.ys[i])) {
        low = high = i;
        break;
      }
      if (series.ys[i] < series.ys[low]) low = i;
      if (series.ys[i] > series.ys[high]) high = i;
    }
    add(std::min(low, high));
    if (low != high) add(std::max(low, high));
  }
  points.back() = {series.xs[n - 1], series.ys[n - 1]};
  return points;
}

std::string LineChartSvg(const LineChart& chart, int width) {
  std::vector<Points> lines;
  Extent xs, ys;
  for (const Series& series : chart.series) {
    lines.push_back(Decimate(series));
    for (const auto& [x, y] : lines.back()) {
      if (!Usable(chart, x, y)) continue;
      xs.Add(chart.log_x ? std::log10(x) : x);
      ys.Add(y);
    }
  }
  if (chart.y_from_zero && ys.lo <= ys.hi) ys.Add(0);
  xs.Widen();
  ys.Widen();
  const double margin = 0.04 * (ys.hi - ys.lo);
  if (!(chart.y_from_zero && ys.lo == 0)) ys.lo -= margin;
  ys.hi += margin;

  const Ticks y_ticks = LabelledTicks(ys.lo, ys.hi, 5, chart.y_style);
  const Plot plot = MakePlot(width, y_ticks);
  const Axis x{xs.lo, xs.hi, plot.left + 2, plot.right - 4, chart.log_x};
  const Axis y{ys.lo, ys.hi, plot.bottom, plot.top};
  const Ticks x_ticks = !chart.x_ticks.empty() ? chart.x_ticks
                        : chart.log_x
                            ? LogTicks(xs.lo, xs.hi)
                            : LabelledTicks(xs.lo, xs.hi, width < 500 ? 5 : 8, chart.x_style);

  // What the hover script needs to turn pixels into values and back.
  std::string out = OpenSvg(
      plot, chart.title,
      fmt::format(" data-x=\"{:.1f} {:.1f} {:.9g} {:.9g}\" data-y=\"{:.1f} {:.1f} {:.9g} {:.9g}\"",
                  x.from_px, x.to_px, x.lo, x.hi, y.from_px, y.to_px, y.lo, y.hi));
  out += Frame(plot, y, y_ticks, chart.x_label, chart.y_label) + XTicks(plot, x, x_ticks);
  for (const bool faint : {true, false}) {
    for (size_t i = 0; i < lines.size(); ++i) {
      const Series& series = chart.series[i];
      if (series.faint != faint) continue;
      const int color = PaletteIndex(series.color, i);
      out += fmt::format("<path class=\"line c{}{}{}\" d=\"{}\"/>\n", color,
                         series.dashed ? " dashed" : "", faint ? " faint" : "",
                         LinePath(chart, lines[i], x, y));
      if (!chart.markers || faint) continue;
      for (const auto& [px, py] : lines[i]) {
        if (!Usable(chart, px, py)) continue;
        out += fmt::format("<circle class=\"dot c{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.2\"/>",
                           color, x.Pixel(px), y.Pixel(py));
      }
    }
  }
  return out + "<g class=\"hover\"></g></svg>\n";
}

std::string BarChartSvg(const BarChart& chart, int width) {
  Extent ys;
  ys.Add(0);
  if (std::isfinite(chart.reference)) ys.Add(chart.reference);
  for (const BarSeries& series : chart.series) {
    DETOUR_CHECK(series.values.size() == chart.categories.size() &&
                     (series.muted.empty() || series.muted.size() == series.values.size()),
                 "{} values, {} muted, {} categories", series.values.size(), series.muted.size(),
                 chart.categories.size());
    for (double v : series.values) {
      if (std::isfinite(v)) ys.Add(v);
    }
  }
  ys.hi = std::isfinite(chart.y_max) ? chart.y_max : ys.hi + 0.06 * (ys.hi - ys.lo);
  if (ys.lo < 0) ys.lo *= 1.06;
  ys.Widen();
  const Ticks y_ticks = LabelledTicks(ys.lo, ys.hi, 5, chart.y_style);
  const Plot plot = MakePlot(width, y_ticks);
  const Axis y{ys.lo, ys.hi, plot.bottom, plot.top};
  std::string out =
      OpenSvg(plot, chart.title, "") + Frame(plot, y, y_ticks, chart.x_label, chart.y_label);

  const auto num_groups = static_cast<double>(std::max<size_t>(1, chart.categories.size()));
  const auto num_series = static_cast<double>(std::max<size_t>(1, chart.series.size()));
  const double group = (plot.right - plot.left) / num_groups;
  const double bar = std::min(34.0, 0.78 * group / num_series);
  const double gap = bar > 6 ? 1.5 : 0.4;
  double free_from = -1e9;
  std::string values;  // on top of the reference line
  for (size_t c = 0; c < chart.categories.size(); ++c) {
    const double center = plot.left + group * (static_cast<double>(c) + 0.5);
    const double half = 3.4 * DisplayWidth(chart.categories[c]);
    if (center - half >= free_from) {
      out += fmt::format("<text class=\"tick mid\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n", center,
                         plot.bottom + 18, EscapeHtml(chart.categories[c]));
      free_from = center + half + 5;
    }
    for (size_t s = 0; s < chart.series.size(); ++s) {
      const BarSeries& series = chart.series[s];
      const double value = series.values[c];
      if (!std::isfinite(value)) continue;
      const bool muted = !series.muted.empty() && series.muted[c];
      const double left = center + bar * (static_cast<double>(s) - num_series / 2) + gap / 2;
      const double at = y.Pixel(std::clamp(value, ys.lo, ys.hi)), zero = y.Pixel(0);
      const std::string tip =
          fmt::format("{}{}{}\n{}: {}{}", chart.x_label, chart.x_label.empty() ? "" : " ",
                      chart.categories[c], series.name, FormatStyled(value, chart.y_style),
                      muted && !chart.muted_label.empty() ? " · " + chart.muted_label : "");
      out += fmt::format(
          "<rect class=\"bar {}\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" "
          "data-tip=\"{}\"/>",
          muted ? "muted" : fmt::format("c{}", PaletteIndex(series.color, s)), left,
          std::min(at, zero), bar - gap, std::max(0.8, std::abs(zero - at)), EscapeHtml(tip));
      if (bar >= 25 && !muted && value >= 0) {
        values += fmt::format(
            "<text class=\"value mid halo\" x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n",
            left + (bar - gap) / 2, at - 5, EscapeHtml(FormatStyled(value, chart.y_style)));
      }
    }
  }
  if (std::isfinite(chart.reference)) {
    out += fmt::format("<path class=\"reference\" d=\"M{:.1f} {:.1f}H{:.1f}\"/>\n", plot.left,
                       y.Pixel(chart.reference), plot.right);
  }
  return out + values + "</svg>\n";
}

}  // namespace detour::report
