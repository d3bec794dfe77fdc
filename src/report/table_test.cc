#include "report/table.h"

#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>

namespace detour::report {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

TEST(Format, Count) {
  EXPECT_EQ(FormatCount(0), "0");
  EXPECT_EQ(FormatCount(999), "999");
  EXPECT_EQ(FormatCount(12.5), "12.5");
  EXPECT_EQ(FormatCount(999.6), "1.00k");
  EXPECT_EQ(FormatCount(12'345), "12.3k");
  EXPECT_EQ(FormatCount(-12'345), "-12.3k");
  EXPECT_EQ(FormatCount(999'499), "999k");
  EXPECT_EQ(FormatCount(999'950), "1.00M");
  EXPECT_EQ(FormatCount(1'234'567), "1.23M");
  EXPECT_EQ(FormatCount(1.3e9), "1.30B");
  EXPECT_EQ(FormatCount(kNan), "nan");
}

TEST(Format, Si) {
  EXPECT_EQ(FormatSi(1.234e9, "FLOP"), "1.23 GFLOP");
  EXPECT_EQ(FormatSi(0.85, "J"), "850 mJ");
  EXPECT_EQ(FormatSi(0.9996, "J"), "1.00 J");
  EXPECT_EQ(FormatSi(0, "J"), "0.00 J");
  EXPECT_EQ(FormatSi(3.2e-6, "s"), "3.20 µs");
  EXPECT_EQ(FormatSi(kInf, "s"), "inf s");
}

TEST(Format, BytesAreBinary) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1.00 KiB");
  EXPECT_EQ(FormatBytes(1536), "1.50 KiB");
  EXPECT_EQ(FormatBytes(1024.0 * 1024 - 1), "1.00 MiB");
  EXPECT_EQ(FormatBytes(4.5 * 1024 * 1024 * 1024), "4.50 GiB");
}

TEST(Format, Duration) {
  EXPECT_EQ(FormatDuration(0.853), "0.85s");
  EXPECT_EQ(FormatDuration(12.34), "12.3s");
  EXPECT_EQ(FormatDuration(59.97), "1m00s");
  EXPECT_EQ(FormatDuration(245), "4m05s");
  EXPECT_EQ(FormatDuration(3599.6), "1h00m");
  EXPECT_EQ(FormatDuration(3720), "1h02m");
  EXPECT_EQ(FormatDuration(86400 * 3 + 4 * 3600), "3d04h");
  EXPECT_EQ(FormatDuration(-1), "?");
  EXPECT_EQ(FormatDuration(kInf), "?");
}

TEST(Format, Others) {
  EXPECT_EQ(FormatPercent(0.1234), "12.3%");
  EXPECT_EQ(FormatThousands(0), "0");
  EXPECT_EQ(FormatThousands(-123), "-123");
  EXPECT_EQ(FormatThousands(8192), "8,192");
  EXPECT_EQ(FormatThousands(-123456), "-123,456");
  EXPECT_EQ(FormatThousands(std::numeric_limits<int64_t>::min()), "-9,223,372,036,854,775,808");
  EXPECT_EQ(FormatFixed(kNan, 2), "nan");
}

TEST(DisplayWidth, CombiningWideAndInvalid) {
  EXPECT_EQ(DisplayWidth("naïve"), 5);
  EXPECT_EQ(DisplayWidth("e\u0301"), 1);
  EXPECT_EQ(DisplayWidth("日本"), 4);
  EXPECT_EQ(DisplayWidth("→─µ"), 3);
  EXPECT_EQ(DisplayWidth("🙂"), 2);
  EXPECT_EQ(DisplayWidth("\xff\xc3"), 2);
  EXPECT_EQ(Truncate("日本語", 5), "日本…");
  EXPECT_EQ(Truncate("日本語", 4), "日…");
  EXPECT_EQ(Truncate("abc", 3), "abc");
  EXPECT_EQ(Truncate("abcd", 3), "ab…");
  EXPECT_EQ(Truncate("abcd", 0), "");
}

TEST(TextTable, Aligns) {
  TextTable table({{"metric", Align::kLeft}, {"dense"}, {"dtrnet"}});
  table.AddRow({"loss", "3.21", "3.2345"});
  table.AddRule();
  table.AddRow({"größe", "1", ""});
  EXPECT_EQ(table.Render(),
            "metric  dense  dtrnet\n"
            "─────────────────────\n"
            "loss     3.21  3.2345\n"
            "─────────────────────\n"
            "größe       1\n");
  EXPECT_THROW(table.AddRow({"one"}), std::logic_error);
}

}  // namespace
}  // namespace detour::report
