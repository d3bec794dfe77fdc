#include "report/energy.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>

namespace detour::report {
namespace {

namespace fs = std::filesystem;

template <typename T>
std::optional<T> Read(const fs::path& path) {
  std::ifstream in(path);
  T value;
  if (!(in >> value)) return std::nullopt;
  return value;
}

}  // namespace

EnergyMeter::EnergyMeter(const std::string& powercap) {
  std::error_code error;
  std::vector<fs::path> found;
  for (fs::directory_iterator it(powercap, error), end; !error && it != end; it.increment(error)) {
    // Only "intel-rapl:": intel-rapl-mmio: repeats package 0.
    if (it->path().filename().string().starts_with("intel-rapl:")) found.push_back(it->path());
  }
  std::sort(found.begin(), found.end());
  bool unreadable = false;
  for (const fs::path& zone : found) {
    const std::string name = Read<std::string>(zone / "name").value_or("");
    // "core" and "uncore" are inside the package; "psys" contains it.
    if (!name.starts_with("package") && name != "dram") continue;
    const auto energy_uj = Read<uint64_t>(zone / "energy_uj");
    const auto range_uj = Read<uint64_t>(zone / "max_energy_range_uj");
    if (!energy_uj || !range_uj) {
      unreadable = true;
      continue;
    }
    zones_.push_back({(zone / "energy_uj").string(), *range_uj, *energy_uj});
    description_ += (description_.empty() ? "" : ", ") + name;
  }
  if (available()) {
    description_ = fmt::format("{} RAPL zones: {}", zones_.size(), description_);
  } else if (unreadable) {
    description_ = "RAPL counters are there but not readable (root only on most systems)";
  } else {
    description_ = "no RAPL counters on this machine";
  }
}

double EnergyMeter::Joules() {
  for (Zone& zone : zones_) {
    const uint64_t now_uj = Read<uint64_t>(zone.path).value_or(zone.last_uj);
    const uint64_t wrapped_uj = now_uj < zone.last_uj ? zone.range_uj : 0;
    total_uj_ += static_cast<double>(now_uj + wrapped_uj - zone.last_uj);
    zone.last_uj = now_uj;
  }
  return total_uj_ * 1e-6;
}

}  // namespace detour::report
