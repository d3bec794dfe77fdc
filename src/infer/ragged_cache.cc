#include "infer/ragged_cache.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "core/error.h"

namespace detour::infer {

namespace {

constexpr int64_t kSystemPage = 4096;
constexpr int64_t kSlabBytes = 256 << 10;

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

PagePool::PagePool(int64_t page_bytes)
    : page_bytes_(page_bytes),
      pages_per_slab_(std::max<int64_t>(1, kSlabBytes / page_bytes)),
      slab_bytes_(RoundUp(pages_per_slab_ * page_bytes, kSystemPage)) {}

PagePool::~PagePool() {
  for (const auto& [address, slab] : slabs_) munmap(address, slab_bytes_);
}

float* PagePool::Take() {
  while (!with_free_.empty()) {
    const auto it = slabs_.find(with_free_.back());
    if (it != slabs_.end() && !it->second.free.empty()) break;
    with_free_.pop_back();
  }
  if (with_free_.empty()) {
    void* memory =
        mmap(nullptr, slab_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // Small system pages: resident memory grows with the entries written, not by 2 MB steps.
    madvise(memory, slab_bytes_, MADV_NOHUGEPAGE);
    char* const address = static_cast<char*>(memory);
    Slab& slab = slabs_[address];
    for (int64_t i = pages_per_slab_ - 1; i >= 0; --i) {
      slab.free.push_back(reinterpret_cast<float*>(address + i * page_bytes_));
    }
    with_free_.push_back(address);
  }
  Slab& slab = slabs_.at(with_free_.back());
  float* const page = slab.free.back();
  slab.free.pop_back();
  if (slab.free.empty()) with_free_.pop_back();
  ++slab.used;
  ++pages_in_use_;
  return page;
}

void PagePool::Give(float* page) {
  auto it = slabs_.upper_bound(reinterpret_cast<char*>(page));
  DETOUR_CHECK(it != slabs_.begin());
  --it;
  Slab& slab = it->second;
  --pages_in_use_;
  if (--slab.used == 0) {
    munmap(it->first, slab_bytes_);
    slabs_.erase(it);
    return;
  }
  slab.free.push_back(page);
  if (slab.free.size() == 1) with_free_.push_back(it->first);
}

LayerCache::LayerCache(const kernels::KvLayout& layout, int64_t window)
    : layout_(layout), pool_(layout.PageBytes()) {
  if (window == 0) return;
  recent_ = std::make_unique<LayerCache>(layout);
  recent_->readable_ = window;
}

LayerCache::~LayerCache() = default;

ops::KvStore::Pages LayerCache::Extend(int32_t sequence, int64_t num_entries) {
  Entries& entries = sequences_[sequence];
  const int64_t first = entries.count;
  const int64_t pages = (first + num_entries + kernels::kPageEntries - 1) / kernels::kPageEntries;
  while (static_cast<int64_t>(entries.pages.size()) < pages) entries.pages.push_back(pool_.Take());
  entries.count += num_entries;
  return {entries.pages.data(), first};
}

void LayerCache::Forget(int32_t sequence, int64_t entry) {
  Entries& entries = sequences_.at(sequence);
  for (; (entries.first_page + 1) * kernels::kPageEntries <= entry; ++entries.first_page) {
    pool_.Give(entries.pages[entries.first_page]);
    entries.pages[entries.first_page] = nullptr;
  }
}

void LayerCache::Shrink(Entries& entries, int64_t count) {
  entries.count = count;
  const int64_t pages = (count + kernels::kPageEntries - 1) / kernels::kPageEntries;
  while (static_cast<int64_t>(entries.pages.size()) > pages) {
    if (entries.pages.back()) pool_.Give(entries.pages.back());
    entries.pages.pop_back();
  }
}

bool LayerCache::Forgotten(const Entries& entries, int64_t entry) const {
  return entry / kernels::kPageEntries < entries.first_page;
}

/// Entries of positions below `num_positions`.
int64_t LayerCache::CountBefore(const Entries& entries, int64_t num_positions) const {
  int64_t count = std::min(entries.count, num_positions);
  // Entry j's position is at least j, so none beyond `count` survives; positions rise.
  while (layout_.with_positions && count > 0 && !Forgotten(entries, count - 1) &&
         layout_.Position(entries.pages.data(), count - 1) >= num_positions) {
    --count;
  }
  return count;
}

bool LayerCache::CanTruncate(int32_t sequence, int64_t num_positions) const {
  if (recent_ && !recent_->CanTruncate(sequence, num_positions)) return false;
  const auto it = sequences_.find(sequence);
  if (it == sequences_.end() || it->second.first_page == 0) return true;
  const int64_t count = CountBefore(it->second, num_positions);
  return !Forgotten(it->second, std::max<int64_t>(0, count - readable_));
}

void LayerCache::Truncate(int32_t sequence, int64_t num_positions) {
  DETOUR_CHECK(CanTruncate(sequence, num_positions),
               "sequence {} cannot go back to {} positions: its window moved on", sequence,
               num_positions);
  if (recent_) recent_->Truncate(sequence, num_positions);
  const auto it = sequences_.find(sequence);
  if (it != sequences_.end()) Shrink(it->second, CountBefore(it->second, num_positions));
}

void LayerCache::Remove(int32_t sequence) {
  if (recent_) recent_->Remove(sequence);
  const auto it = sequences_.find(sequence);
  if (it == sequences_.end()) return;
  Shrink(it->second, 0);
  sequences_.erase(it);
}

int64_t LayerCache::num_entries(int32_t sequence) const {
  const auto it = sequences_.find(sequence);
  return it == sequences_.end() ? 0 : it->second.count;
}

int64_t LayerCache::num_recent(int32_t sequence) const {
  if (!recent_) return 0;
  const auto it = recent_->sequences_.find(sequence);
  if (it == recent_->sequences_.end()) return 0;
  return it->second.count - it->second.first_page * kernels::kPageEntries;
}

RaggedCache::RaggedCache(const model::ModelConfig& config) {
  for (int32_t l = 0; l < config.num_layers; ++l) {
    const model::KvShape shape = model::KvShapeOf(config, l);
    layers_.push_back(std::make_unique<LayerCache>(shape.layout, shape.window.size));
    stores_.push_back(layers_.back().get());
  }
}

void RaggedCache::Truncate(int32_t sequence, int64_t num_positions) {
  for (auto& layer : layers_) layer->Truncate(sequence, num_positions);
}

bool RaggedCache::CanTruncate(int32_t sequence, int64_t num_positions) const {
  return std::ranges::all_of(
      layers_, [&](const auto& layer) { return layer->CanTruncate(sequence, num_positions); });
}

void RaggedCache::Remove(int32_t sequence) {
  for (auto& layer : layers_) layer->Remove(sequence);
}

int64_t RaggedCache::bytes() const {
  int64_t bytes = 0;
  for (const auto& layer : layers_) bytes += layer->bytes();
  return bytes;
}

}  // namespace detour::infer
