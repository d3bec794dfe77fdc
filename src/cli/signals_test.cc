#include "cli/signals.h"

#include <gtest/gtest.h>
#include <poll.h>
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

TEST(Signals, AnInterruptCanBeForgottenATerminationCannot) {
  const auto readable = [] {
    pollfd fd = {StopDescriptor(), POLLIN, 0};
    return poll(&fd, 1, 0) == 1;
  };
  InstallStopHandler();
  EXPECT_FALSE(readable());
  for (int i = 0; i < 3; ++i) {
    raise(SIGINT);
    EXPECT_TRUE(StopRequested());
    EXPECT_TRUE(readable());
    ForgetInterrupt();
    EXPECT_FALSE(StopRequested());
    EXPECT_FALSE(readable());
  }
  raise(SIGINT);
  raise(SIGTERM);
  ForgetInterrupt();
  EXPECT_TRUE(StopRequested());
  EXPECT_TRUE(readable());
  InstallStopHandler();
  EXPECT_FALSE(readable());
  signal(SIGINT, SIG_DFL);
  signal(SIGTERM, SIG_DFL);
}

}  // namespace
}  // namespace detour::cli
