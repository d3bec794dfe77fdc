#include "cli/signals.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>

namespace detour::cli {
namespace {

std::atomic<bool> stop_requested{false};
static_assert(std::atomic<bool>::is_always_lock_free);  // or the handler could not touch it

void OnSignal(int signal) {
  if (stop_requested.exchange(true) && signal == SIGINT) _exit(128 + SIGINT);
}

}  // namespace

void InstallStopHandler() {
  stop_requested = false;
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool StopRequested() { return stop_requested.load(std::memory_order_relaxed); }

}  // namespace detour::cli
