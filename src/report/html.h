// One self-contained HTML page from a generic description: headings, text, tables, charts, route
// maps. No external resource, light and dark, readable on a phone; the charts stand without
// JavaScript, which only adds hover values.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace detour::report {

/// How an axis and its hover values are written.
enum class NumberStyle {
  kPlain,    ///< 0.5, 2.75, 12k, 1.3M
  kPercent,  ///< of fractions: 0.15 → 15%
  kBytes,    ///< KiB, MiB, GiB
};

struct Series {
  std::string name;
  std::vector<double> xs,
      ys;  ///< same length, xs ascending; a y that is not finite breaks the line
  bool dashed = false;
  bool faint = false;  ///< thin and pale, below the others: a noisy training loss
  int color = -1;      ///< index into the palette; default: its place in the chart
};

struct LineChart {
  std::string title, x_label, y_label;
  std::vector<Series> series;
  bool log_x = false;  ///< needs xs > 0; other points are left out
  bool y_from_zero = false;
  NumberStyle x_style = NumberStyle::kPlain, y_style = NumberStyle::kPlain;
  std::vector<std::pair<double, std::string>> x_ticks;  ///< value, label; default: nice numbers
  bool markers = false;                                 ///< a dot at each point
  std::string note;                                     ///< caption below
};

struct BarSeries {
  std::string name;
  std::vector<double> values;    ///< one per category; not finite: no bar
  std::vector<bool> muted = {};  ///< drawn neutral (a dense layer); empty: none
  int color = -1;
};

/// Groups of bars from zero, one group per category.
struct BarChart {
  std::string title, x_label, y_label;
  std::vector<std::string> categories;
  std::vector<BarSeries> series;
  NumberStyle y_style = NumberStyle::kPlain;
  double y_max =
      std::numeric_limits<double>::quiet_NaN();  ///< top of the axis; default: from the values
  double reference =
      std::numeric_limits<double>::quiet_NaN();  ///< a dashed line, e.g. the target share
  std::string reference_label, muted_label, note;
};

/// Metric rows × model columns.
struct ComparisonTable {
  struct Row {
    std::string metric;
    std::string detail;              ///< small print below the metric, may be empty
    std::vector<std::string> cells;  ///< one per column
    bool section = false;            ///< a sub-heading across the table: only `metric` is used
  };
  std::string title;
  std::vector<std::string> columns;
  std::vector<Row> rows;
  std::string note;
};

/// A number worth a large figure at the top of the page.
struct KeyFigure {
  std::string value, label, detail;
};

struct TextSample {
  std::string title;
  std::string prompt;  ///< shown before `text`, set apart; may be empty
  std::string text;
};

enum class LayerKind : uint8_t { kDense, kRouted };

/// Which tokens attended in which layer.
struct RouteMap {
  std::string title, note;
  std::vector<std::string> tokens;       ///< T texts: any bytes
  std::vector<std::string> layer_names;  ///< L
  std::vector<LayerKind> kinds;          ///< L
  std::vector<uint8_t> routed;           ///< [L][T], 1 = attends; ignored on dense layers
  std::vector<float> p;  ///< [L][T], the router's probability to attend; ignored on dense layers
  int64_t first_position = 0;  ///< position of tokens[0] in its document
};

/// Text for an HTML body or a quoted attribute: & < > " ' as entities; newline and tab stay; other
/// control characters, bidirectional overrides and invalid UTF-8 become visible escapes (\x00,
/// \u{202E}), so that no text can leave its place.
std::string EscapeHtml(std::string_view text);

/// At most `max_ticks` + 1 multiples of 1, 2, 2.5 or 5 × 10^k that lie in [lo, hi]. Requires finite
/// lo < hi, max_ticks >= 1.
std::vector<double> NiceTicks(double lo, double hi, int max_ticks);

/// The <svg> of a chart, `width` CSS pixels wide (360 for phones, 860 for pages), without its title
/// and legend; coloured by the page's style sheet.
std::string LineChartSvg(const LineChart& chart, int width);
std::string BarChartSvg(const BarChart& chart, int width);
/// Key, layer names and the tokens as wrapped text with their lanes below. `id` differs between the
/// maps of a page.
std::string RouteMapHtml(const RouteMap& map, int id);

/// Parts appear in the order of the calls. Not thread-safe.
class HtmlPage {
 public:
  explicit HtmlPage(std::string title, std::string subtitle = {});
  /// A section heading.
  void Heading(std::string_view text);
  void Paragraph(std::string_view text);
  void KeyFigures(const std::vector<KeyFigure>& figures);
  void Table(const ComparisonTable& table);
  void Chart(const LineChart& chart);
  void Chart(const BarChart& chart);
  void Map(const RouteMap& map);
  /// Side by side where there is room.
  void TextSamples(const std::vector<TextSample>& samples);
  /// Small print at the end of the page.
  void Footer(std::string_view text);
  /// The whole document.
  std::string Render() const;

 private:
  std::string title_, subtitle_, body_, footer_;
  int num_maps_ = 0;
};

}  // namespace detour::report
