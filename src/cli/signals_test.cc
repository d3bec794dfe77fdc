#include "cli/signals.h"

#include <gtest/gtest.h>
#include <signal.h>

namespace detour::cli {
namespace {

TEST(Signals, FirstSetsTheFlagSecondInterruptExits) {
  for (const int first : {SIGINT, SIGTERM}) {
    InstallStopHandler();
    EXPECT_FALSE(StopRequested());
    raise(first);
    EXPECT_TRUE(StopRequested());
    raise(SIGTERM);  // a supervisor that repeats itself changes nothing
    EXPECT_TRUE(StopRequested());
    EXPECT_EXIT(raise(SIGINT), testing::ExitedWithCode(130), "");
  }
  signal(SIGINT, SIG_DFL);
  signal(SIGTERM, SIG_DFL);
}

}  // namespace
}  // namespace detour::cli
