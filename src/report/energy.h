// Energy used by the processor packages, from the RAPL counters of Linux's powercap.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace detour::report {

/// Sums the package and DRAM zones under /sys/class/powercap (Intel and AMD alike: intel-rapl:*).
/// Counts everything the machine does, not this process alone. The counters wrap (after about 260
/// kJ: 40 minutes at 100 W), so Joules() must be called at least that often. Not thread-safe.
class EnergyMeter {
 public:
  /// Starts at 0 J. Never throws: a machine without readable counters has an absent meter.
  explicit EnergyMeter(const std::string& powercap = "/sys/class/powercap");
  bool available() const { return !zones_.empty(); }
  /// "2 zones: package-0, dram", or why there is none, in words for a person.
  const std::string& description() const { return description_; }
  /// Joules since construction; 0 if absent.
  double Joules();

 private:
  struct Zone {
    std::string path;  ///< of energy_uj
    uint64_t range_uj, last_uj;
  };
  std::vector<Zone> zones_;
  std::string description_;
  double total_uj_ = 0;
};

}  // namespace detour::report
