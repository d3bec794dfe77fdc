#include "report/memory.h"

#include <fstream>
#include <string>

namespace detour::report {
namespace {

/// The number after `key` (e.g. "Rss:") in a /proc file of "Key: N kB" lines, in bytes; 0 if
/// absent.
int64_t ReadKilobytes(const char* path, const std::string& key) {
  std::ifstream in(path);
  std::string word;
  int64_t kilobytes = 0;
  while (in >> word) {
    if (word == key && in >> kilobytes) return kilobytes * 1024;
  }
  return 0;
}

}  // namespace

int64_t CurrentRssBytes() { return ReadKilobytes("/proc/self/status", "VmRSS:"); }

int64_t ExactRssBytes() {
  const int64_t exact = ReadKilobytes("/proc/self/smaps_rollup", "Rss:");
  return exact > 0 ? exact : CurrentRssBytes();
}

int64_t PeakRssBytes() { return ReadKilobytes("/proc/self/status", "VmHWM:"); }

bool ResetPeakRss() {
  std::ofstream out("/proc/self/clear_refs");
  out << "5" << std::flush;  // proc(5): resets VmHWM
  return out.good();
}

}  // namespace detour::report
