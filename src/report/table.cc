#include "report/table.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "report/utf8.h"

namespace detour::report {
namespace {

/// Three significant digits of a value below 1000 (after rounding).
std::string ThreeDigits(double value) {
  const double a = std::abs(value);
  return fmt::format("{:.{}f}", value, a < 9.995 ? 2 : a < 99.95 ? 1 : 0);
}

/// Divides by `base` while three digits would show it as `base` or more; at most `max_steps` times.
int Scale(double* value, double base, int max_steps) {
  int steps = 0;
  // 999.5 would round to 1000, and 1023.5 to 1024.
  while (std::abs(*value) >= base - 0.5 && steps < max_steps) {
    *value /= base;
    ++steps;
  }
  return steps;
}

struct Range {
  uint32_t first, last;
};

bool In(uint32_t code, std::initializer_list<Range> ranges) {
  return std::any_of(ranges.begin(), ranges.end(),
                     [&](Range r) { return code >= r.first && code <= r.last; });
}

int CharWidth(const Utf8Char& c) {
  if (!c.valid) return 1;
  if (c.code < 0x20 || (c.code >= 0x7F && c.code < 0xA0)) return 0;
  if (c.code < 0x300) return 1;
  // Combining marks of the common scripts, zero-width and bidirectional controls, variation
  // selectors.
  if (In(c.code,
         {{0x300, 0x36F},    {0x483, 0x489},   {0x591, 0x5BD},   {0x610, 0x61A},   {0x64B, 0x65F},
          {0x93C, 0x93C},    {0x941, 0x948},   {0x94D, 0x94D},   {0xE31, 0xE31},   {0xE34, 0xE3A},
          {0xE47, 0xE4E},    {0x1AB0, 0x1AFF}, {0x1DC0, 0x1DFF}, {0x200B, 0x200F}, {0x202A, 0x202E},
          {0x2060, 0x2069},  {0x20D0, 0x20FF}, {0xFE00, 0xFE0F}, {0xFE20, 0xFE2F}, {0xFEFF, 0xFEFF},
          {0xE0100, 0xE01EF}})) {
    return 0;
  }
  // Unicode's East Asian Width W and F, in blocks.
  if (In(c.code, {{0x1100, 0x115F},
                  {0x231A, 0x231B},
                  {0x23E9, 0x23EC},
                  {0x2E80, 0x303E},
                  {0x3041, 0xA4CF},
                  {0xA960, 0xA97F},
                  {0xAC00, 0xD7A3},
                  {0xF900, 0xFAFF},
                  {0xFE30, 0xFE6F},
                  {0xFF00, 0xFF60},
                  {0xFFE0, 0xFFE6},
                  {0x1F300, 0x1F64F},
                  {0x1F680, 0x1F6FF},
                  {0x1F900, 0x1F9FF},
                  {0x1FA70, 0x1FAFF},
                  {0x20000, 0x3FFFD}})) {
    return 2;
  }
  return 1;
}

}  // namespace

std::string FormatCount(double value) {
  if (!std::isfinite(value)) return fmt::format("{}", value);
  static constexpr const char* kSuffix[] = {"", "k", "M", "B", "T", "Q"};
  if (std::abs(value) < 999.5 && value == std::floor(value)) return fmt::format("{:.0f}", value);
  const int steps = Scale(&value, 1000, 5);
  return ThreeDigits(value) + kSuffix[steps];
}

std::string FormatSi(double value, std::string_view unit) {
  if (!std::isfinite(value)) return fmt::format("{} {}", value, unit);
  static constexpr const char* kPrefix[] = {"n", "µ", "m", "", "k", "M", "G", "T", "P", "E"};
  int prefix = 3;
  if (value != 0 && std::abs(value) < 0.9995) {
    while (prefix > 0 && std::abs(value) < 0.9995) {
      value *= 1000;
      --prefix;
    }
  } else {
    prefix += Scale(&value, 1000, 6);
  }
  return fmt::format("{} {}{}", ThreeDigits(value), kPrefix[prefix], unit);
}

std::string FormatBytes(double bytes) {
  if (!std::isfinite(bytes)) return fmt::format("{} B", bytes);
  static constexpr const char* kUnit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  const int steps = Scale(&bytes, 1024, 5);
  if (steps == 0) return fmt::format("{:.0f} B", bytes);
  return fmt::format("{} {}", ThreeDigits(bytes), kUnit[steps]);
}

std::string FormatDuration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  if (seconds < 9.995) return fmt::format("{:.2f}s", seconds);
  if (seconds < 59.95) return fmt::format("{:.1f}s", seconds);
  if (seconds < 3599.5) {
    const auto s = std::llround(seconds);
    return fmt::format("{}m{:02}s", s / 60, s % 60);
  }
  if (seconds > 1e12) return "?";
  const auto minutes = std::llround(seconds / 60);
  if (minutes < 24 * 60) return fmt::format("{}h{:02}m", minutes / 60, minutes % 60);
  const auto hours = std::llround(seconds / 3600);
  return fmt::format("{}d{:02}h", hours / 24, hours % 24);
}

std::string FormatPercent(double fraction, int digits) {
  return fmt::format("{:.{}f}%", 100 * fraction, digits);
}

std::string FormatThousands(int64_t value) {
  const std::string digits = fmt::format("{}", value);
  const size_t first = value < 0 ? 1 : 0;
  std::string out;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > first && (digits.size() - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out;
}

std::string FormatFixed(double value, int digits) { return fmt::format("{:.{}f}", value, digits); }

int DisplayWidth(std::string_view utf8) {
  int width = 0;
  for (size_t at = 0; at < utf8.size();) {
    const Utf8Char c = DecodeUtf8(utf8, at);
    width += CharWidth(c);
    at += c.length;
  }
  return width;
}

std::string Truncate(std::string_view utf8, int columns) {
  if (DisplayWidth(utf8) <= columns) return std::string(utf8);
  if (columns <= 0) return {};
  int width = 0;
  size_t at = 0;
  while (at < utf8.size()) {
    const Utf8Char c = DecodeUtf8(utf8, at);
    if (width + CharWidth(c) > columns - 1) break;
    width += CharWidth(c);
    at += c.length;
  }
  return std::string(utf8.substr(0, at)) + "…";
}

TextTable::TextTable(std::vector<Column> columns) : columns_(std::move(columns)) {
  DETOUR_CHECK(!columns_.empty());
}

void TextTable::AddRow(std::vector<std::string> cells) {
  DETOUR_CHECK(cells.size() == columns_.size(), "{} cells for {} columns", cells.size(),
               columns_.size());
  rows_.push_back(std::move(cells));
}

void TextTable::AddRule() { rows_.emplace_back(); }

std::string TextTable::Render() const {
  std::vector<int> widths;
  for (size_t i = 0; i < columns_.size(); ++i) {
    int width = DisplayWidth(columns_[i].header);
    for (const auto& row : rows_) {
      if (!row.empty()) width = std::max(width, DisplayWidth(row[i]));
    }
    widths.push_back(width);
  }
  std::string out;
  const auto line = [&](const auto& cell_at) {
    std::string text;
    for (size_t i = 0; i < columns_.size(); ++i) {
      const std::string& cell = cell_at(i);
      const std::string pad(widths[i] - DisplayWidth(cell), ' ');
      if (i > 0) text += "  ";
      text += columns_[i].align == Align::kRight ? pad + cell : cell + pad;
    }
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + '\n';
  };
  const auto rule = [&] {
    int total = 2 * (static_cast<int>(widths.size()) - 1);
    for (int width : widths) total += width;
    for (int i = 0; i < total; ++i) out += "─";
    out += '\n';
  };
  line([&](size_t i) -> const std::string& { return columns_[i].header; });
  rule();
  for (const auto& row : rows_) {
    if (row.empty()) {
      rule();
    } else {
      line([&](size_t i) -> const std::string& { return row[i]; });
    }
  }
  return out;
}

}  // namespace detour::report
