// System calls of this folder: every one checked, EINTR and short writes handled, fail points
// before it.
#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

namespace detour::io {

/// "PATH: cannot VERB: errno's text. Hint: …" from the current errno, as Error(`code`).
[[noreturn]] void FailErrno(const char* code, const std::string& path, const char* verb);

/// An owned file descriptor.
class Fd {
 public:
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd();
  Fd(Fd&& other) : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&&) = delete;
  int get() const { return fd_; }

  /// A regular file for reading. Anything else (directory, FIFO, device) is Error("io.read"), at
  /// once: a FIFO without a writer does not block.
  static Fd OpenRegular(const std::string& path, struct stat* info);

 private:
  int fd_;
};

/// The bytes of a file, mapped read only for as long as `owner` lives. The file must not shrink
/// meanwhile (replacing it by a rename is fine).
struct Mapping {
  std::shared_ptr<const void> owner;
  std::span<const std::byte> bytes;
};
/// A regular file, as Fd::OpenRegular; Error("io.read"). An empty file has no bytes.
Mapping MapFile(const std::string& path);

/// `bytes` as floats; none if they are not aligned for it.
inline std::span<const float> AlignedFloats(std::span<const std::byte> bytes) {
  if (reinterpret_cast<uintptr_t>(bytes.data()) % alignof(float) != 0) return {};
  return {reinterpret_cast<const float*>(bytes.data()), bytes.size() / sizeof(float)};
}

/// The process keeps no pages of the mapped file for `bytes` (within a Mapping): they come back
/// from the file if they are read again. So a tensor that was converted counts once, not twice.
void ForgetPages(std::span<const std::byte> bytes);

/// Calls convert(bytes, values) for one part of a tensor after the other, each a whole number of
/// blocks, and forgets the part's pages if `mapped`.
template <typename Convert>
void ConvertInParts(std::span<const std::byte> bytes, std::span<float> out, bool mapped,
                    const Convert& convert) {
  constexpr size_t kElements = size_t{1} << 22;  // a multiple of every block
  for (size_t done = 0, at = 0; done < out.size();) {
    const size_t n = std::min(kElements, out.size() - done), size = bytes.size() * n / out.size();
    const std::span<const std::byte> part = bytes.subspan(at, size);
    convert(part, out.subspan(done, n));
    if (mapped) ForgetPages(part);
    done += n;
    at += size;
  }
}

/// One file being written. Without Finish the destructor removes the file again: nothing
/// half-written stays.
class FileWriter {
 public:
  /// Creates or truncates. Error("io.write").
  explicit FileWriter(std::string path);
  ~FileWriter();
  void Write(std::span<const std::byte> bytes);
  void Finish();  ///< fsync and close

 private:
  std::string path_;
  Fd fd_;
  bool regular_ = true;  // a device or a pipe cannot be synced and is not ours to remove
  bool finished_ = false;
};

/// fsync of a file or directory by name; Error("io.write").
void Sync(const std::string& path);

/// rename(2); Error("io.write").
void Rename(const std::string& from, const std::string& to);

}  // namespace detour::io
