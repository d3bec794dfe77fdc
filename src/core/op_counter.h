// Counts arithmetic where it is executed: the kernels add to it, `detour info` and the tests
// compare it with formulas.
#pragma once

#include <atomic>
#include <cstdint>

namespace detour {

/// Multiply-adds count as 2 FLOP. Process-wide, relaxed atomics: one addition per kernel call.
struct OpCounter {
  std::atomic<int64_t> gemm_flops{0};  ///< 2·N·M·K of each matrix product
  std::atomic<int64_t> attention_flops{
      0};                                ///< 4·K per (query head, visited key): scores and values
  std::atomic<int64_t> visited_keys{0};  ///< (query row, key) pairs, heads not counted
  void Reset() { gemm_flops = attention_flops = visited_keys = 0; }
  int64_t Total() const { return gemm_flops + attention_flops; }
};
OpCounter& GlobalOpCounter();

}  // namespace detour
