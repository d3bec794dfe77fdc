#include "io/posix.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <mutex>
#include <string_view>
#include <system_error>

#include "core/error.h"
#include "io/atomic.h"

namespace detour::io {
namespace {

// Repeats a call that a signal interrupted.
template <typename Call>
auto Retry(Call call) {
  for (;;) {
    const auto result = call();
    if (result != -1 || errno != EINTR) return result;
  }
}

const char* Hint(int error) {
  switch (error) {
    case ENOENT:
      return " Hint: the file or the directory it is to be in is missing";
    case ENOSPC:
    case EDQUOT:
      return " Hint: free some space or choose another disk";
    case EACCES:
    case EPERM:
    case EROFS:
      return " Hint: choose a place you may write to, or change its permissions";
    default:
      return "";
  }
}

}  // namespace

void FailErrno(const char* code, const std::string& path, const char* verb) {
  const int error = errno;
  const bool reading = std::string_view(code) == "io.read";
  Fail(code, "{}: cannot {}: {}.{}", path, verb, std::generic_category().message(error),
       reading ? "" : Hint(error));
}

bool FailPoint(const char* kind) {
  static std::mutex mutex;
  static std::string last_spec;
  static int64_t calls = 0;

  const char* env = getenv("DETOUR_FAIL_POINT");
  if (env == nullptr) return false;
  const std::string_view spec = env;
  const std::string_view spec_kind = spec.substr(0, spec.find(':'));
  if (spec_kind != kind) return false;
  std::lock_guard lock(mutex);
  if (spec != last_spec) {  // a test sets the variable again in the same process
    last_spec = spec;
    calls = 0;
  }
  char* end = nullptr;
  const int64_t n =
      spec_kind.size() < spec.size() ? strtoll(env + spec_kind.size() + 1, &end, 10) : 0;
  if (++calls != n) return false;
  if (std::string_view(end) == ":kill") raise(SIGKILL);
  errno = ENOSPC;
  return true;
}

Fd::~Fd() {
  if (fd_ >= 0) close(fd_);
}

Fd Fd::OpenRegular(const std::string& path, struct stat* info) {
  // O_NONBLOCK: opening a FIFO returns at once and is then refused.
  const int fd =
      Retry([&] { return open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); });
  if (fd < 0) FailErrno("io.read", path, "open");
  Fd owned(fd);
  if (fstat(fd, info) != 0) FailErrno("io.read", path, "stat");
  if (!S_ISREG(info->st_mode)) {
    Fail("io.read", "{}: expected a file, got {}", path,
         S_ISDIR(info->st_mode)    ? "a directory"
         : S_ISFIFO(info->st_mode) ? "a pipe"
                                   : "a device or socket");
  }
  return owned;
}

Mapping MapFile(const std::string& path) {
  struct stat info;
  const Fd fd = Fd::OpenRegular(path, &info);
  const size_t size = info.st_size;
  if (size == 0) return {};
  void* const data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED) FailErrno("io.read", path, "map");
  return {std::shared_ptr<const void>(
              data, [size](const void* p) { munmap(const_cast<void*>(p), size); }),
          {static_cast<const std::byte*>(data), size}};
}

void ForgetPages(std::span<const std::byte> bytes) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(bytes.data());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + bytes.size()) / page * page;
  // A hint: where it fails the pages stay.
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

FileWriter::FileWriter(std::string path)
    : path_(std::move(path)), fd_(Retry([this] {
        return open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY, 0666);
      })) {
  if (fd_.get() < 0) FailErrno("io.write", path_, "create");
  struct stat info;
  if (fstat(fd_.get(), &info) != 0) FailErrno("io.write", path_, "stat");
  regular_ = S_ISREG(info.st_mode);
}

FileWriter::~FileWriter() {
  if (!finished_ && regular_) unlink(path_.c_str());
}

void FileWriter::Write(std::span<const std::byte> bytes) {
  constexpr size_t kLargestWrite = size_t{1} << 28;
  while (!bytes.empty()) {
    const size_t size = std::min(bytes.size(), kLargestWrite);
    const ssize_t n =
        FailPoint("write") ? -1 : Retry([&] { return write(fd_.get(), bytes.data(), size); });
    if (n < 0) FailErrno("io.write", path_, "write");
    bytes = bytes.subspan(n);
  }
}

void FileWriter::Finish() {
  if (regular_ && (FailPoint("fsync") || Retry([&] { return fsync(fd_.get()); }) != 0)) {
    FailErrno("io.write", path_, "sync");
  }
  finished_ = true;
}

void Sync(const std::string& path) {
  const Fd fd(Retry([&] { return open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); }));
  if (fd.get() < 0) FailErrno("io.write", path, "open");
  if (FailPoint("fsync") || Retry([&] { return fsync(fd.get()); }) != 0) {
    FailErrno("io.write", path, "sync");
  }
}

void Rename(const std::string& from, const std::string& to) {
  if (FailPoint("rename") || rename(from.c_str(), to.c_str()) != 0) {
    FailErrno("io.write", to, "rename into place");
  }
}

}  // namespace detour::io
