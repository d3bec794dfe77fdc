// Ctrl-C and SIGTERM ask long commands to stop at the next safe point.
#pragma once

namespace detour::cli {

/// From here on SIGINT and SIGTERM only set the flag of StopRequested(). A SIGINT when it is
/// already set ends the process at once with exit code 130. Interrupted system calls restart.
void InstallStopHandler();

/// Whether a signal came since InstallStopHandler(). Thread-safe, one relaxed load.
bool StopRequested();

/// Forgets a SIGINT that came, so that the next one is a first one again. A SIGTERM stays.
void ForgetInterrupt();

/// A file descriptor that poll finds readable while a stop is requested; -1 if there is none to be
/// had.
int StopDescriptor();

}  // namespace detour::cli
