// Speed of the kernels. Arguments named `threads` and `avx512` set the program-wide choices; GFLOP
// and bytes are rates per second of wall time.
#include <benchmark/benchmark.h>

#include <cmath>
#include <vector>

#include "core/error.h"
#include "core/threads.h"
#include "kernels/kernels.h"

namespace detour::kernels {
namespace {

std::vector<float> Wave(int64_t n) {
  std::vector<float> v(n);
  for (int64_t i = 0; i < n; ++i) v[i] = std::sin(0.37f * static_cast<float>(i % 100003));
  return v;
}

/// False, with the benchmark skipped, where the machine lacks the target.
bool Choose(benchmark::State& state, int64_t threads, int64_t avx512) {
  try {
    SetSimd(avx512 ? Simd::kAvx512 : Simd::kAvx2);
  } catch (const Error& e) {
    state.SkipWithError(e.what());
    return false;
  }
  SetNumThreads(static_cast<int>(threads));
  return true;
}

void Report(benchmark::State& state, double flops, double bytes) {
  using benchmark::Counter;
  if (flops > 0)
    state.counters["GFLOP"] = Counter(flops * 1e-9, Counter::kIsIterationInvariantRate);
  state.counters["GB"] = Counter(bytes * 1e-9, Counter::kIsIterationInvariantRate);
}

void BM_Gemm(benchmark::State& state) {
  const int64_t rows = state.range(0), inputs = state.range(1), outputs = state.range(2);
  if (!Choose(state, state.range(3), state.range(4))) return;
  const std::vector<float> x = Wave(rows * inputs), w = Wave(outputs * inputs);
  std::vector<float> y(rows * outputs);
  PackedMatrix packed;
  packed.Pack(w.data(), outputs, inputs, inputs);
  for (auto _ : state) {
    Gemm(x.data(), inputs, rows, packed, nullptr, y.data(), outputs);
    benchmark::ClobberMemory();
  }
  Report(state, 2.0 * rows * inputs * outputs,
         4.0 * (rows * inputs + inputs * outputs + rows * outputs));
}

void BM_Pack(benchmark::State& state) {
  const int64_t inputs = state.range(0), outputs = state.range(1);
  if (!Choose(state, state.range(2), 0)) return;
  const std::vector<float> w = Wave(outputs * inputs);
  PackedMatrix packed;
  for (auto _ : state) {
    packed.Pack(w.data(), outputs, inputs, inputs);
    benchmark::ClobberMemory();
  }
  Report(state, 0, 8.0 * inputs * outputs);
}

/// `rows` queries, the last of a sequence of `keys`.
void BM_Attend(benchmark::State& state) {
  const int64_t rows = state.range(0), keys = state.range(1), heads = state.range(2);
  const int64_t kv_heads = state.range(3), dim = state.range(4);
  if (!Choose(state, state.range(5), state.range(6))) return;
  const KvLayout layout{kv_heads, dim, false};
  const int64_t page_floats = layout.PageBytes() / 4, num_pages = (keys + 15) / 16;
  std::vector<float> buffer(num_pages * page_floats + 16);
  float* aligned = buffer.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 64) ++aligned;
  std::vector<float*> pages;
  for (int64_t p = 0; p < num_pages; ++p) pages.push_back(aligned + p * page_floats);
  const std::vector<float> k = Wave(keys * kv_heads * dim), q = Wave(rows * heads * dim);
  WriteKvRows(layout, pages.data(), 0, keys, k.data(), kv_heads * dim, k.data(), kv_heads * dim,
              nullptr);
  const AttendSegment segment{pages.data(), 0, rows, keys - rows + 1};
  std::vector<float> out(rows * heads * dim);
  for (auto _ : state) {
    Attend(layout, heads, 1 / std::sqrt(static_cast<float>(dim)), q.data(), heads * dim,
           {&segment, 1}, out.data(), heads * dim, nullptr);
    benchmark::ClobberMemory();
  }
  const double visited = rows * (keys - rows) + rows * (rows + 1) / 2.0;
  Report(state, 4.0 * dim * heads * visited, 8.0 * keys * kv_heads * dim);
}

void BM_RmsNorm(benchmark::State& state) {
  const int64_t rows = state.range(0), dim = state.range(1);
  if (!Choose(state, state.range(2), state.range(3))) return;
  const std::vector<float> x = Wave(rows * dim), w = Wave(dim);
  std::vector<float> y(rows * dim);
  for (auto _ : state) {
    RmsNorm(x.data(), rows, dim, w.data(), 1e-5f, y.data(), nullptr);
    benchmark::ClobberMemory();
  }
  Report(state, 0, 8.0 * rows * dim);
}

void BM_SiluMul(benchmark::State& state) {
  const int64_t n = state.range(0);
  if (!Choose(state, state.range(1), state.range(2))) return;
  const std::vector<float> g = Wave(n), u = Wave(n);
  std::vector<float> h(n);
  for (auto _ : state) {
    SiluMul(g.data(), u.data(), n, h.data());
    benchmark::ClobberMemory();
  }
  Report(state, 0, 12.0 * n);
}

/// `shape` with threads 1 and 2 and both targets.
void Add(benchmark::internal::Benchmark* b, const std::vector<int64_t>& shape) {
  for (const int64_t threads : {1, 2}) {
    for (const int64_t avx512 : {0, 1}) {
      std::vector<int64_t> args = shape;
      args.insert(args.end(), {threads, avx512});
      b->Args(args);
    }
  }
}

void GemmArgs(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "inputs", "outputs", "threads", "avx512"})->UseRealTime();
  Add(b, {2048, 256, 768});
  Add(b, {2048, 768, 256});
  Add(b, {4096, 320, 320});
  Add(b, {2048, 1024, 1024});
  Add(b, {16, 576, 1536});
  Add(b, {4, 576, 1536});
  Add(b, {1, 576, 1536});
  Add(b, {1, 2048, 8192});
}

void AttendArgs(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "keys", "heads", "kv_heads", "dim", "threads", "avx512"})->UseRealTime();
  Add(b, {2048, 2048, 9, 3, 64});
  Add(b, {1024, 1024, 4, 4, 64});
  Add(b, {128, 16384, 9, 3, 64});
  Add(b, {1, 2048, 9, 3, 64});
  Add(b, {1, 32768, 8, 8, 64});
}

BENCHMARK(BM_Gemm)->Apply(GemmArgs);
BENCHMARK(BM_Pack)->ArgNames({"inputs", "outputs", "threads"})->Args({768, 2048, 1})->UseRealTime();
BENCHMARK(BM_Attend)->Apply(AttendArgs);
BENCHMARK(BM_RmsNorm)
    ->ArgNames({"rows", "dim", "threads", "avx512"})
    ->Apply([](auto* b) {
      Add(b, {2048, 320});
    }) -> UseRealTime();
BENCHMARK(BM_SiluMul)
    ->ArgNames({"n", "threads", "avx512"})
    ->Apply([](auto* b) { Add(b, {1 << 20}); }) -> UseRealTime();

}  // namespace
}  // namespace detour::kernels
