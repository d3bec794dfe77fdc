// Resident memory of this process, from /proc/self.
#pragma once

#include <cstdint>

namespace detour::report {

/// Resident bytes now, exact (smaps_rollup: walks the page tables, about 1 ms per GiB), or the
/// kernel's own running estimate where that file can't be read. 0 where there is no /proc.
int64_t CurrentRssBytes();
/// Highest resident bytes since start or the last reset (VmHWM). 0 where there is no /proc.
int64_t PeakRssBytes();
/// Sets the peak to the present use; false where that is not permitted (the peak then still counts
/// from the start).
bool ResetPeakRss();

}  // namespace detour::report
