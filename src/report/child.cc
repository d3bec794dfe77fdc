#include "report/child.h"

#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

namespace detour::report {

namespace {

/// A file in memory.
struct MemoryFile {
  int fd = memfd_create("detour", MFD_CLOEXEC);
  ~MemoryFile() {
    if (fd >= 0) close(fd);
  }
};

}  // namespace

std::optional<std::string> OutputOf(const std::vector<std::string>& args,
                                    const std::string& input) {
  const MemoryFile in, out;
  if (in.fd < 0 || out.fd < 0 ||
      pwrite(in.fd, input.data(), input.size(), 0) != static_cast<ssize_t>(input.size())) {
    return std::nullopt;
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in.fd, STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, out.fd, STDOUT_FILENO);
  std::vector<char*> argv;
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  pid_t child = -1;
  const int error = posix_spawn(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return std::nullopt;
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return std::nullopt;
  }
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) return std::nullopt;
  std::string text(static_cast<size_t>(lseek(out.fd, 0, SEEK_END)), '\0');
  if (pread(out.fd, text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) {
    return std::nullopt;
  }
  return text;
}

}  // namespace detour::report
