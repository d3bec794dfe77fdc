// The status line, the time estimate, memory and energy.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "report/energy.h"
#include "report/memory.h"
#include "report/status.h"

namespace detour::report {
namespace {

namespace fs = std::filesystem;

/// What `use` prints through a StatusLine of the given options.
template <typename Use>
std::string Printed(StatusOptions options, const Use& use) {
  char* buffer = nullptr;
  size_t size = 0;
  options.out = open_memstream(&buffer, &size);
  {
    StatusLine status(options);
    use(status);
  }
  std::fclose(options.out);
  std::string text(buffer, size);
  std::free(buffer);
  return text;
}

TEST(StatusLine, TerminalRewritesAndThrottles) {
  const std::string text =
      Printed({.terminal = true, .width = 8, .live_interval_s = 1000}, [](StatusLine& s) {
        s.Update("one");
        s.Update("two");          // too soon
        s.Update("three", true);  // forced
        s.Print("stays");
        s.Update("long long line");  // too soon, but the last: Finish shows it
      });
  EXPECT_EQ(text, "\r\x1b[Kone\r\x1b[Kthree\r\x1b[Kstays\n\r\x1b[Kthree\r\x1b[Klong l…\n");
}

TEST(StatusLine, PlainLinesElsewhere) {
  const std::string text =
      Printed({.terminal = false, .plain_interval_s = 1000}, [](StatusLine& s) {
        s.Update("one\nnot this");
        s.Update("two");
        s.Update("three", true);
        s.Print("stays");
        s.Finish();
        s.Finish();
      });
  EXPECT_EQ(text, "one\nthree\nstays\n");
  EXPECT_EQ(Printed({.terminal = true}, [](StatusLine&) {}), "");
}

TEST(Eta, MovingWindow) {
  Eta eta(100, 10);
  EXPECT_EQ(eta.Rate(), 0);
  EXPECT_LT(eta.RemainingSeconds(), 0);
  eta.Update(0, 0);
  eta.Update(1, 5);
  EXPECT_DOUBLE_EQ(eta.Rate(), 0.2);
  EXPECT_DOUBLE_EQ(eta.RemainingSeconds(), 495);
  for (int t = 6; t <= 30; ++t) eta.Update(1 + 2 * (t - 5), t);
  EXPECT_DOUBLE_EQ(eta.Rate(), 2);
  // One step longer than the window still has a rate.
  eta.Update(61, 130);
  EXPECT_GT(eta.Rate(), 0);
}

TEST(Memory, FollowsAllocation) {
  if (CurrentRssBytes() == 0) GTEST_SKIP() << "no /proc/self";
  constexpr int64_t kBytes = 64 << 20;
  const bool reset = ResetPeakRss();
  const int64_t before = CurrentRssBytes(), before_exact = ExactRssBytes();
  {
    std::vector<char> block(kBytes);
    std::memset(block.data(), 1, block.size());
    asm volatile("" : : "r"(block.data()) : "memory");
    EXPECT_NEAR(static_cast<double>(CurrentRssBytes() - before), kBytes, 0.1 * kBytes);
    EXPECT_NEAR(static_cast<double>(ExactRssBytes() - before_exact), kBytes, 0.02 * kBytes);
  }
  EXPECT_GE(PeakRssBytes(), before + kBytes * 9 / 10);
  if (reset) {
    ASSERT_TRUE(ResetPeakRss());
    EXPECT_LE(PeakRssBytes(), ExactRssBytes() + (4 << 20));
  }
}

TEST(Energy, SumsZonesAndWrapsAround) {
  const fs::path root = fs::temp_directory_path() / ("detour_rapl_" + std::to_string(getpid()));
  const auto zone = [&](const char* zone_name, const char* name, const char* energy) {
    fs::create_directories(root / zone_name);
    std::ofstream(root / zone_name / "name") << name << "\n";
    std::ofstream(root / zone_name / "max_energy_range_uj") << "10000000\n";
    std::ofstream(root / zone_name / "energy_uj") << energy << "\n";
  };
  zone("intel-rapl:0", "package-0", "9000000");
  zone("intel-rapl:0:0", "core", "5");
  zone("intel-rapl:0:1", "dram", "1000000");
  zone("intel-rapl-mmio:0", "package-0", "7");
  EnergyMeter meter(root.string());
  EXPECT_TRUE(meter.available());
  EXPECT_EQ(meter.description(), "2 RAPL zones: package-0, dram");
  EXPECT_EQ(meter.Joules(), 0);
  zone("intel-rapl:0", "package-0", "9500000");
  zone("intel-rapl:0:1", "dram", "1250000");
  EXPECT_DOUBLE_EQ(meter.Joules(), 0.75);
  zone("intel-rapl:0", "package-0", "500000");  // wrapped: 0.5 J to the range's end, 0.5 J after
  EXPECT_DOUBLE_EQ(meter.Joules(), 1.75);
  fs::remove_all(root);
  EXPECT_DOUBLE_EQ(meter.Joules(), 1.75);

  EnergyMeter absent(root.string());
  EXPECT_FALSE(absent.available());
  EXPECT_EQ(absent.Joules(), 0);
  EXPECT_EQ(absent.description(), "no RAPL counters on this machine");
}

}  // namespace
}  // namespace detour::report
