// One ParallelFor for the whole program. Work is split by the caller's ranges only; no result may
// depend on the split.
#pragma once

#include <cstdint>
#include <functional>

namespace detour {

using RangeFn = std::function<void(int64_t begin, int64_t end)>;

/// Calls `fn` on disjoint ranges that cover [begin, end), each at least `grain` long where
/// possible, on up to NumThreads() threads, and waits. An exception of any range is rethrown here
/// (one of them, if several). Nested calls run serially on the calling thread. Thread-safe.
void ParallelFor(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn);

/// Threads that ParallelFor uses, this one included; at start the number of hardware threads.
int NumThreads();
/// Requires n >= 1. Not to be called while a ParallelFor runs.
void SetNumThreads(int n);

/// A program that has another pool (libtorch's OpenMP) sends ParallelFor there, so that two pools
/// do not fight for the cores. Not thread-safe: called once at start, by ops/.
struct ParallelBackend {
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn);
  void (*set_num_threads)(int n);
};
void SetParallelBackend(ParallelBackend backend);

}  // namespace detour
