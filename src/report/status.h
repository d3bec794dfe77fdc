// One live status line on a terminal, plain lines elsewhere; and the estimate of the time that is
// left.
#pragma once

#include <cstdint>
#include <cstdio>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace detour::report {

struct StatusOptions {
  std::FILE* out = stderr;
  std::optional<bool> terminal;  ///< default: `out` is a terminal and TERM is not "dumb"
  int width = 0;  ///< columns; 0: ask the terminal at every update, 80 if it doesn't say
  double live_interval_s = 0.1;    ///< a terminal's line is rewritten at most this often
  double plain_interval_s = 10.0;  ///< lines elsewhere, unless forced
};

/// Terminal: rewrites its last line in place, cut to the width. Elsewhere: whole lines, rarely. Not
/// thread-safe.
class StatusLine {
 public:
  explicit StatusLine(StatusOptions options = {});
  ~StatusLine() { Finish(); }
  StatusLine(const StatusLine&) = delete;
  StatusLine& operator=(const StatusLine&) = delete;

  /// Shows `text` (one line of UTF-8), or, if one was shown a moment ago, remembers it for
  /// Finish(). `force` shows it now.
  void Update(std::string_view text, bool force = false);
  /// A line that stays, above the live one.
  void Print(std::string_view line);
  /// Leaves the newest text standing and ends its line, so that what follows starts at column 0.
  /// May be called again.
  void Finish();

 private:
  void Show();
  StatusOptions options_;
  bool terminal_;
  std::string text_;
  bool shown_ = false;  ///< text_ is what the reader sees
  bool live_ = false;   ///< the cursor stands on a line of ours
  double last_s_ = -1e9;
};

/// Rate of progress over a moving window, and what is left at that rate. Time is any monotonic
/// clock, in seconds.
class Eta {
 public:
  explicit Eta(double total, double window_s = 30.0) : total_(total), window_s_(window_s) {}
  /// `done` of `total` at time `now_s`; neither may decrease.
  void Update(double done, double now_s);
  /// The same, at MonotonicSeconds().
  void Update(double done);
  /// Units per second over the window; 0 until two updates.
  double Rate() const;
  /// Seconds to go; negative if not known yet (FormatDuration shows "?").
  double RemainingSeconds() const;

 private:
  double total_, window_s_;
  std::deque<std::pair<double, double>> points_;  ///< (time, done), oldest first
};

/// Seconds of the monotonic clock.
double MonotonicSeconds();

}  // namespace detour::report
