// Products of many experts against one dense product of the same work: `experts` matrices, each for
// `rows` rows; experts 1 is the dense one. Forward alone, or with both backward products.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

#include "core/threads.h"
#include "ops/linear.h"
#include "ops/torch_threads.h"

namespace detour::ops {
namespace {

void BM_Experts(benchmark::State& state) {
  const int64_t experts = state.range(0), rows = state.range(1), inputs = state.range(2);
  const int64_t outputs = state.range(3);
  const bool backward = state.range(4) != 0;
  SetNumThreads(static_cast<int>(state.range(5)));
  InstallTorchThreads();
  std::vector<Matrix> matrices(experts);
  std::vector<at::Tensor> x;
  for (Matrix& m : matrices) {
    m.weight = at::randn({outputs, inputs}).mul_(0.02).requires_grad_(backward);
    x.push_back(at::randn({rows, inputs}).requires_grad_(backward));
  }
  const at::Tensor dy = at::ones({rows, outputs});
  for (auto _ : state) {
    for (int64_t e = 0; e < experts; ++e) {
      const at::Tensor y = Linear(x[e], matrices[e]);
      if (!backward) continue;
      torch::autograd::backward({y}, {dy});
      x[e].mutable_grad() = at::Tensor();
      matrices[e].weight.mutable_grad() = at::Tensor();
    }
  }
  const double flops = 2e-9 * static_cast<double>(experts * rows * inputs * outputs);
  state.counters["GFLOP"] =
      benchmark::Counter(flops * (backward ? 3 : 1), benchmark::Counter::kIsIterationInvariantRate);
}

BENCHMARK(BM_Experts)
    ->ArgNames({"experts", "rows", "inputs", "outputs", "backward", "threads"})
    ->Apply([](auto* b) {
      for (const int64_t threads : {1, 2}) {
        for (const int64_t backward : {0, 1}) {
          b->Args({1, 1024, 576, 1536, backward, threads});
          b->Args({8, 128, 576, 1536, backward, threads});
          b->Args({1, 8192, 576, 1536, backward, threads});
          b->Args({64, 128, 576, 1536, backward, threads});
        }
      }
    }) -> UseRealTime();

}  // namespace
}  // namespace detour::ops
