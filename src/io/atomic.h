// Files and directories that appear whole or not at all: written beside their place, fsynced,
// renamed.
//
// A temporary of NAME is called .NAME.tmp-PID-N, a directory set aside while its successor moves in
// .NAME.old-PID-N, both in NAME's own directory. They belong to process PID of this host for as
// long as it lives.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace detour::io {

/// Whole file, at most `max_bytes`. Error("io.read") with path and reason (missing, a directory, a
/// pipe, too large).
std::string ReadFile(const std::string& path, int64_t max_bytes = int64_t{1} << 30);

/// Plain write + fsync of one file; for use inside an AtomicDir. Error("io.write") with errno's
/// text; the file is then removed.
void WriteFile(const std::string& path, std::string_view content);

/// Writes `path` through a temporary sibling, fsync, rename, fsync of the parent. On Error the old
/// file is untouched and no temporary is left (a kill may leave one; CleanTemporaries removes it).
void WriteFileAtomic(const std::string& path, std::string_view content);

/// A file under construction: write path() by whatever means, then Commit(), which does what
/// WriteFileAtomic does. Without Commit the destructor removes it.
class AtomicFile {
 public:
  /// Error("io.write") if `target` is a directory.
  explicit AtomicFile(std::string target);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  const std::string& path() const { return temporary_; }
  void Commit();

 private:
  std::string target_, temporary_;
};

/// A directory under construction: write into path(), then Commit(). Without Commit the destructor
/// removes it. An existing target (whatever is in it: the caller asks first) is replaced: renamed
/// aside, the new one renamed in, the old one removed. A kill between the two renames leaves no
/// target until CleanTemporaries, or the next AtomicDir of that name, puts the old one back. A
/// target that is a symbolic link to a directory is followed. Commit syncs every file and directory
/// below path(), however it was written. On Error the old target is in its place, or, if only the
/// very last sync failed, the new one, and the old one stays set aside until it is cleaned.
class AtomicDir {
 public:
  explicit AtomicDir(std::string target);
  ~AtomicDir();
  AtomicDir(const AtomicDir&) = delete;
  AtomicDir& operator=(const AtomicDir&) = delete;
  const std::string& path() const { return temporary_; }
  void Commit();

 private:
  std::string target_, temporary_;
  bool committed_ = false;
};

/// Removes a directory so that a kill leaves all of it or nothing under its name (a temporary may
/// stay).
void RemoveDir(const std::string& path);

/// After a kill: removes temporaries of dead processes in `parent` and restores set-aside
/// directories whose target is missing. Those of a live process are left alone. A missing `parent`
/// has none.
void CleanTemporaries(const std::string& parent);

/// `link` -> `target` (a relative name), replaced atomically. The pointer file of checkpoints:
/// "latest".
void ReplaceSymlink(const std::string& link, const std::string& target);

/// Test hook: every write, fsync, rename and removal of this folder asks FailPoint("write" |
/// "fsync" | "rename" | "remove"). With the environment variable DETOUR_FAIL_POINT=KIND:N the N-th
/// such call sets errno to ENOSPC and returns true: the caller fails (KIND:N:kill: the process is
/// killed by SIGKILL).
bool FailPoint(const char* kind);

}  // namespace detour::io
