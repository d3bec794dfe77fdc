// Resident memory of this process, from /proc/self.
#pragma once

#include <cstdint>

namespace detour::report {

/// Resident bytes now by the kernel's running count (VmRSS), which may lag by some hundred KiB; 40
/// µs. 0 where there is no /proc.
int64_t CurrentRssBytes();
/// The same, exact (smaps_rollup): walks the page tables, about 50 ms per GiB of 4 KiB pages. For
/// measurements, not for every step. Falls back to CurrentRssBytes() where that file can't be read.
int64_t ExactRssBytes();
/// Highest resident bytes since start or the last reset (VmHWM). 0 where there is no /proc.
int64_t PeakRssBytes();
/// Sets the peak to the present use; false where that is not permitted (the peak then still counts
/// from the start).
bool ResetPeakRss();

}  // namespace detour::report
