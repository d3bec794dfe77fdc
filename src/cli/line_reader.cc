#include "cli/line_reader.h"

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "cli/signals.h"
#include "core/error.h"

namespace detour::cli {

namespace {
constexpr size_t kMaxLineBytes = size_t{8} << 20;
}  // namespace

LineReader::LineReader(int fd) : fd_(fd) {
  termios now;
  if (tcgetattr(fd, &now) != 0) return;
  terminal_ = now;
  now.c_iflag |= IUTF8;
  tcsetattr(fd, TCSANOW, &now);
}

LineReader::~LineReader() {
  if (terminal_) tcsetattr(fd_, TCSANOW, &*terminal_);
}

/// Takes a line out of the buffer, if there is one.
bool LineReader::Cut(std::string* line, bool at_end) {
  const size_t end = buffer_.find('\n', searched_);
  searched_ = buffer_.size();
  if (searched_ > kMaxLineBytes && (end == std::string::npos || end > kMaxLineBytes)) {
    Fail("chat.input", "a line has more than {} bytes", kMaxLineBytes);
  }
  if (end == std::string::npos && !(at_end && !buffer_.empty())) return false;
  *line = buffer_.substr(0, end);
  buffer_.erase(0, end == std::string::npos ? end : end + 1);
  searched_ = 0;
  if (line->ends_with('\r')) line->pop_back();
  return true;
}

LineReader::Result LineReader::Read(std::string* line) {
  while (true) {
    if (StopRequested()) return Result::kStopped;
    if (Cut(line, /*at_end=*/false)) return Result::kLine;
    pollfd fds[] = {{fd_, POLLIN, 0}, {StopDescriptor(), POLLIN, 0}};
    if (poll(fds, 2, -1) < 0 && errno != EINTR) {
      Fail("chat.input", "standard input: {}", std::strerror(errno));
    }
    if (StopRequested()) return Result::kStopped;
    if (fds[0].revents == 0) continue;
    char bytes[1 << 16];
    const ssize_t n = read(fd_, bytes, sizeof(bytes));
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    // EIO: the terminal is gone.
    if (n == 0 || (n < 0 && errno == EIO)) {
      return Cut(line, /*at_end=*/true) ? Result::kLine : Result::kEnd;
    }
    if (n < 0) Fail("chat.input", "standard input: {}", std::strerror(errno));
    buffer_.append(bytes, n);
  }
}

}  // namespace detour::cli
