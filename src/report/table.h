// Aligned text tables for terminals, and the one way this project prints numbers for people.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace detour::report {

/// "999", "12.3k", "1.23M", "4.50B", "1.20T": three significant digits (integers below 1000
/// exactly). Decimal steps.
std::string FormatCount(double value);
/// "1.23 GFLOP", "850 mJ": three significant digits with an SI prefix from n to E.
std::string FormatSi(double value, std::string_view unit);
/// "512 B", "1.50 KiB", "4.50 GiB": binary units, three significant digits.
std::string FormatBytes(double bytes);
/// "0.85s", "12.3s", "4m05s", "1h02m", "3d04h"; "?" if negative or not finite.
std::string FormatDuration(double seconds);
/// "12.3%" of a fraction 0.123.
std::string FormatPercent(double fraction, int digits = 1);
/// "8,192".
std::string FormatThousands(int64_t value);
/// Fixed decimals; "nan", "inf" spelled out.
std::string FormatFixed(double value, int digits);

/// Terminal columns of UTF-8 text: combining marks and controls 0, East Asian wide and emoji 2, all
/// else 1 (an approximation of wcwidth that needs no locale). An invalid byte counts 1.
int DisplayWidth(std::string_view utf8);
/// The longest prefix of whole characters with DisplayWidth <= `columns`; ends in "…" if something
/// was cut.
std::string Truncate(std::string_view utf8, int columns);

enum class Align { kLeft, kRight };

/// A table whose columns are as wide as their widest cell. Not thread-safe.
class TextTable {
 public:
  struct Column {
    std::string header;
    Align align = Align::kRight;
  };

  explicit TextTable(std::vector<Column> columns);
  /// Requires one cell per column.
  void AddRow(std::vector<std::string> cells);
  /// A line across the table before the next row.
  void AddRule();
  /// Header, a rule, the rows; two blanks between columns; every line ends in '\n' without trailing
  /// blanks.
  std::string Render() const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;  ///< An empty row is a rule.
};

}  // namespace detour::report
