#include "io/atomic.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <filesystem>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "core/error.h"
#include "io/posix.h"

namespace detour::io {
namespace {

namespace fs = std::filesystem;

// File names this process has handed out and not yet given back. Another one with our PID is of a
// dead process that had it too: common in containers, where the main process has the same one each
// time.
std::mutex live_mutex;
std::set<std::string> live;

struct Place {
  std::string parent, base;
};

Place Split(const std::string& path) {
  const size_t end = path.find_last_not_of('/');
  const std::string trimmed = path.substr(0, end == path.npos ? 0 : end + 1);
  const size_t slash = trimmed.rfind('/');
  Place place;
  place.base = slash == trimmed.npos ? trimmed : trimmed.substr(slash + 1);
  place.parent = slash == trimmed.npos ? "." : slash == 0 ? "/" : trimmed.substr(0, slash);
  if (place.base.empty() || place.base == "." || place.base == "..") {
    Fail("io.write", "\"{}\": expected the name of a file or directory to write", path);
  }
  return place;
}

struct TemporaryName {
  std::string base;  // of what it is a temporary
  std::string kind;  // "tmp" or "old"
  int64_t pid = 0;
  int64_t n = 0;

  std::string ToString() const { return fmt::format(".{}.{}-{}-{}", base, kind, pid, n); }
};

// A file name that this process has not used before.
std::string NewName(const std::string& base, const char* kind) {
  std::lock_guard lock(live_mutex);
  static int64_t next = 0;
  return *live.insert(TemporaryName{base, kind, getpid(), next++}.ToString()).first;
}

void GiveBack(const std::string& file_name) {
  std::lock_guard lock(live_mutex);
  live.erase(file_name);
}

std::optional<TemporaryName> ParseName(const std::string& file_name) {
  for (const char* kind : {"tmp", "old"}) {
    const size_t at = file_name.rfind(fmt::format(".{}-", kind));
    if (file_name[0] != '.' || at == file_name.npos || at < 2) continue;
    TemporaryName name{file_name.substr(1, at - 1), kind};
    const char* const end = file_name.data() + file_name.size();
    const auto pid = std::from_chars(file_name.data() + at + 5, end, name.pid);
    if (pid.ec != std::errc() || pid.ptr == end) continue;
    std::from_chars(pid.ptr + 1, end, name.n);
    if (name.pid > 0 && name.ToString() == file_name) return name;
  }
  return std::nullopt;
}

bool OwnerLives(const TemporaryName& name) {
  if (name.pid == getpid()) {
    std::lock_guard lock(live_mutex);
    return live.count(name.ToString()) != 0;
  }
  return kill(static_cast<pid_t>(name.pid), 0) == 0 || errno == EPERM;
}

bool Exists(const std::string& path) {
  struct stat info;
  if (lstat(path.c_str(), &info) == 0) return true;
  if (errno != ENOENT) FailErrno("io.write", path, "stat");
  return false;
}

void RemoveTree(const std::string& path) {
  std::error_code error;
  if (FailPoint("remove")) return;
  fs::remove_all(path, error);  // what stays is a temporary: the next CleanTemporaries tries again
}

// Removes a set-aside directory. Under its own name a half-removed one could later be restored.
void Discard(const Place& place, const std::string& file_name) {
  const std::string trash = NewName(place.base, "tmp");
  const std::string to = place.parent + "/" + trash;
  RemoveTree(to);  // of a dead process with our PID
  if (rename((place.parent + "/" + file_name).c_str(), to.c_str()) == 0) RemoveTree(to);
  GiveBack(trash);
}

// Removes or restores what dead processes left in `parent`; only of `base` if that is given.
void Clean(const std::string& parent, const std::string& base = "") {
  std::error_code error;
  std::vector<std::string> file_names;  // collected first: cleaning changes the directory
  for (fs::directory_iterator it(parent, error), end; !error && it != end; it.increment(error)) {
    file_names.push_back(it->path().filename().string());
  }
  if (error == std::errc::no_such_file_or_directory) return;
  if (error) Fail("io.read", "{}: cannot list the directory: {}", parent, error.message());
  for (const std::string& file_name : file_names) {
    const std::optional<TemporaryName> name = ParseName(file_name);
    if (!name || (!base.empty() && name->base != base) || OwnerLives(*name)) continue;
    const std::string target = parent + "/" + name->base;
    if (name->kind == "tmp") {
      RemoveTree(parent + "/" + file_name);
    } else if (Exists(target)) {
      Discard({parent, name->base}, file_name);
    } else {
      try {
        Rename(parent + "/" + file_name, target);
      } catch (const Error&) {
        if (Exists(parent + "/" + file_name)) throw;  // else another process was quicker
      }
      Sync(parent);
    }
  }
}

// A free name beside the target. `make` creates it and returns 0, or -1 with errno.
template <typename Make>
std::string MakeTemporary(const Place& place, const char* verb, Make make) {
  for (;;) {
    const std::string name = NewName(place.base, "tmp");
    const std::string path = place.parent + "/" + name;
    if (make(path) == 0) return path;
    GiveBack(name);
    if (errno != EEXIST) FailErrno("io.write", place.parent + "/" + place.base, verb);
  }
}

void GiveBackPath(const std::string& path) { GiveBack(Split(path).base); }

void SyncTree(const std::string& root) {
  std::error_code error;
  for (fs::recursive_directory_iterator it(root, error), end; !error && it != end;
       it.increment(error)) {
    const fs::file_status status = it->symlink_status(error);
    if (!error && (fs::is_regular_file(status) || fs::is_directory(status))) {
      Sync(it->path().string());
    }
  }
  if (error) Fail("io.write", "{}: cannot list the directory: {}", root, error.message());
  Sync(root);
}

// A directory to be replaced may be reached by a link: the link stays and what it names is
// replaced.
std::string FollowLink(const std::string& target) {
  const Place place = Split(target);
  const std::string path = place.parent + "/" + place.base;
  std::error_code error;
  if (!fs::is_symlink(path, error)) return path;
  const std::string resolved = fs::canonical(path, error).string();
  if (error) Fail("io.write", "{}: a symbolic link to nothing: {}", target, error.message());
  return resolved;
}

}  // namespace

std::string ReadFile(const std::string& path, int64_t max_bytes) {
  struct stat info;
  const Fd fd = Fd::OpenRegular(path, &info);
  const auto check = [&](int64_t size) {
    if (size > max_bytes) {
      Fail("io.read", "{}: expected at most {} bytes, got more", path, max_bytes);
    }
  };
  check(info.st_size);
  // Not st_size alone: a file may grow, and files of /proc say 0.
  std::string content(info.st_size + 1, '\0');
  size_t size = 0;
  for (;;) {
    const ssize_t n = read(fd.get(), content.data() + size, content.size() - size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) FailErrno("io.read", path, "read");
    if (n == 0) break;
    size += n;
    check(size);
    if (size == content.size()) content.resize(2 * size);
  }
  content.resize(size);
  return content;
}

void WriteFile(const std::string& path, std::string_view content) {
  FileWriter writer(path);
  writer.Write(std::as_bytes(std::span(content)));
  writer.Finish();
}

void WriteFileAtomic(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  WriteFile(file.path(), content);
  file.Commit();
}

AtomicFile::AtomicFile(std::string target) : target_(std::move(target)) {
  std::error_code error;
  if (target_.ends_with('/') || fs::is_directory(target_, error)) {
    Fail("io.write", "{}: expected a file to write, got a directory", target_);
  }
  if (fs::exists(target_, error) && !fs::is_regular_file(target_, error)) {
    Fail("io.write", "{}: expected a file to write, got a device, pipe or socket", target_);
  }
  temporary_ = MakeTemporary(Split(target_), "write", [](const std::string& path) {
    return Fd(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)).get() < 0 ? -1 : 0;
  });
}

AtomicFile::~AtomicFile() {
  if (!temporary_.empty()) {
    unlink(temporary_.c_str());
    GiveBackPath(temporary_);
  }
}

void AtomicFile::Commit() {
  DETOUR_CHECK(!temporary_.empty(), "Commit twice");
  Sync(temporary_);
  Rename(temporary_, target_);
  GiveBackPath(temporary_);
  temporary_.clear();
  Sync(Split(target_).parent);
}

AtomicDir::AtomicDir(std::string target) : target_(FollowLink(target)) {
  const Place place = Split(target_);
  Clean(place.parent, place.base);
  std::error_code error;
  if (Exists(target_) && !fs::is_directory(target_, error)) {
    Fail("io.write", "{}: expected a directory or nothing, got a file", target);
  }
  temporary_ = MakeTemporary(place, "create",
                             [](const std::string& path) { return mkdir(path.c_str(), 0777); });
}

AtomicDir::~AtomicDir() {
  if (!committed_) RemoveTree(temporary_);
  GiveBackPath(temporary_);
}

void AtomicDir::Commit() {
  DETOUR_CHECK(!committed_, "Commit twice");
  const Place place = Split(target_);
  SyncTree(temporary_);
  std::string aside;  // empty: there was no old one
  if (Exists(target_)) {
    do {
      aside = NewName(place.base, "old");
    } while (Exists(place.parent + "/" + aside));
    Rename(target_, place.parent + "/" + aside);
  }
  try {
    Rename(temporary_, target_);
  } catch (const Error&) {
    if (!aside.empty()) {
      rename((place.parent + "/" + aside).c_str(), target_.c_str());
      GiveBack(aside);
    }
    throw;
  }
  committed_ = true;
  if (!aside.empty()) GiveBack(aside);
  Sync(place.parent);
  if (!aside.empty()) Discard(place, aside);
}

void RemoveDir(const std::string& path) {
  const Place place = Split(path);
  Discard(place, place.base);
}

void CleanTemporaries(const std::string& parent) { Clean(parent); }

void ReplaceSymlink(const std::string& link, const std::string& target) {
  const Place place = Split(link);
  const std::string temporary = MakeTemporary(place, "link", [&](const std::string& path) {
    return symlink(target.c_str(), path.c_str());
  });
  try {
    Rename(temporary, place.parent + "/" + place.base);
  } catch (const Error&) {
    unlink(temporary.c_str());
    GiveBackPath(temporary);
    throw;
  }
  GiveBackPath(temporary);
  Sync(place.parent);
}

}  // namespace detour::io
