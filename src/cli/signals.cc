#include "cli/signals.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace detour::cli {
namespace {

std::atomic<int> stop_signal{0};
static_assert(std::atomic<int>::is_always_lock_free);  // or the handler could not touch it
int stop_pipe[2] = {-1, -1};

void OnSignal(int signal) {
  if (stop_signal.exchange(signal) != 0 && signal == SIGINT) _exit(128 + SIGINT);
  const int error = errno;
  // A full pipe is readable already.
  [[maybe_unused]] const ssize_t written = write(stop_pipe[1], "", 1);
  errno = error;
}

void DrainPipe() {
  char bytes[64];
  while (stop_pipe[0] >= 0 && read(stop_pipe[0], bytes, sizeof(bytes)) > 0) {
  }
}

}  // namespace

void InstallStopHandler() {
  if (stop_pipe[0] < 0 && pipe2(stop_pipe, O_CLOEXEC | O_NONBLOCK) != 0) {
    stop_pipe[0] = stop_pipe[1] = -1;
  }
  stop_signal = 0;
  DrainPipe();
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool StopRequested() { return stop_signal.load(std::memory_order_relaxed) != 0; }

void ForgetInterrupt() {
  if (stop_signal != SIGINT) return;
  DrainPipe();
  int expected = SIGINT;
  stop_signal.compare_exchange_strong(expected, 0);
  // A SIGTERM of this moment may have lost its byte.
  if (expected == SIGTERM) {
    [[maybe_unused]] const ssize_t written = write(stop_pipe[1], "", 1);
  }
}

int StopDescriptor() { return stop_pipe[0]; }

}  // namespace detour::cli
