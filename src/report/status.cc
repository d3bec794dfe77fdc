#include "report/status.h"

#include <sys/ioctl.h>

#include <chrono>

#include "report/table.h"
#include "report/terminal.h"

namespace detour::report {
namespace {

int Columns(std::FILE* out) {
  winsize size{};
  return ioctl(fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

constexpr const char* kEraseLine = "\r\x1b[K";

}  // namespace

double MonotonicSeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

StatusLine::StatusLine(StatusOptions options)
    : options_(options), terminal_(options.terminal.value_or(IsTerminal(options.out))) {}

void StatusLine::Update(std::string_view text, bool force) {
  text_ = text.substr(0, text.find('\n'));
  shown_ = false;
  const double interval_s = terminal_ ? options_.live_interval_s : options_.plain_interval_s;
  if (force || MonotonicSeconds() - last_s_ >= interval_s) Show();
}

void StatusLine::Show() {
  if (terminal_) {
    // The last column stays free: writing there makes some terminals wrap.
    const int columns = (options_.width > 0 ? options_.width : Columns(options_.out)) - 1;
    std::fprintf(options_.out, "%s%s", kEraseLine, Truncate(text_, columns).c_str());
    live_ = true;
  } else {
    std::fprintf(options_.out, "%s\n", text_.c_str());
  }
  std::fflush(options_.out);
  shown_ = true;
  last_s_ = MonotonicSeconds();
}

void StatusLine::Print(std::string_view line) {
  const bool redraw = live_;
  std::fprintf(options_.out, "%s%.*s\n", live_ ? kEraseLine : "", static_cast<int>(line.size()),
               line.data());
  live_ = false;
  if (redraw) Show();
  std::fflush(options_.out);
}

void StatusLine::Finish() {
  if (!shown_ && !text_.empty()) Show();
  if (live_) std::fputc('\n', options_.out);
  std::fflush(options_.out);
  live_ = false;
  text_.clear();
}

void Eta::Update(double done, double now_s) {
  points_.emplace_back(now_s, done);
  // The oldest point may lie before the window, so that slow steps still give a rate.
  while (points_.size() > 2 && points_[1].first <= now_s - window_s_) points_.pop_front();
}

void Eta::Update(double done) { Update(done, MonotonicSeconds()); }

double Eta::Rate() const {
  if (points_.size() < 2) return 0;
  const double seconds = points_.back().first - points_.front().first;
  return seconds > 0 ? (points_.back().second - points_.front().second) / seconds : 0;
}

double Eta::RemainingSeconds() const {
  const double rate = Rate();
  return rate > 0 ? (total_ - points_.back().second) / rate : -1;
}

}  // namespace detour::report
