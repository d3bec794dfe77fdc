#include "ops/torch_threads.h"

#include <ATen/Parallel.h>

#include "core/threads.h"

namespace detour::ops {

void InstallTorchThreads() {
  SetParallelBackend(
      {.parallel_for = [](int64_t begin, int64_t end, int64_t grain,
                          const RangeFn& fn) { at::parallel_for(begin, end, grain, fn); },
       .set_num_threads = [](int n) { at::set_num_threads(n); }});
  SetNumThreads(NumThreads());
}

}  // namespace detour::ops
