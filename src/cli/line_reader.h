// Lines from a person or a pipe, until a signal asks to stop.
#pragma once

#include <termios.h>

#include <optional>
#include <string>

namespace detour::cli {

/// On a terminal the erase key takes whole UTF-8 characters (until this is destroyed). Nothing else
/// may read from the descriptor. Not thread-safe.
class LineReader {
 public:
  explicit LineReader(int fd);
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  enum class Result { kLine, kEnd, kStopped };
  /// The next line without its end; the last may lack one. kStopped as soon as a stop is requested
  /// (cli/signals.h). Error("chat.input") for a line of more than 8 MiB, and where reading fails.
  Result Read(std::string* line);

 private:
  bool Cut(std::string* line, bool at_end);
  int fd_;
  std::string buffer_;
  size_t searched_ = 0;  // bytes without a line's end
  std::optional<termios> terminal_;
};

}  // namespace detour::cli
