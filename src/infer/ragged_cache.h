// Keys and values of every layer, ragged: a routed layer holds the tokens that attended there and
// no others.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "model/config.h"
#include "ops/attention.h"

namespace detour::infer {

/// Pages of one size, cut from slabs that are mapped as needed and unmapped when their last page is
/// given back. Not thread-safe.
class PagePool {
 public:
  explicit PagePool(int64_t page_bytes);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  float*
  Take();  ///< zeroed when fresh, else with old content; std::bad_alloc if there is no memory
  void Give(float* page);
  int64_t pages_in_use() const { return pages_in_use_; }
  int64_t bytes_in_use() const { return pages_in_use_ * page_bytes_; }

 private:
  struct Slab {
    std::vector<float*> free;
    int64_t used = 0;
  };
  int64_t page_bytes_, pages_per_slab_, slab_bytes_;
  int64_t pages_in_use_ = 0;
  std::map<char*, Slab> slabs_;  // by address
  std::vector<char*>
      with_free_;  // slabs that had a free page when last touched; may hold stale entries
};

/// One layer of the cache. Entries of a sequence are in order of position, 16 to a page.
class LayerCache : public ops::KvStore {
 public:
  LayerCache(const kernels::KvLayout& layout);
  ~LayerCache() override;
  Pages Extend(int32_t sequence, int64_t num_entries) override;
  /// Drops entries at positions >= `num_positions`, and pages that hold no entry any more.
  void Truncate(int32_t sequence, int64_t num_positions);
  void Remove(int32_t sequence);
  int64_t num_entries(int32_t sequence) const;
  int64_t bytes() const { return pool_.bytes_in_use(); }
  const kernels::KvLayout& layout() const { return layout_; }

 private:
  struct Entries {
    std::vector<float*> pages;
    int64_t count = 0;
  };
  void Shrink(Entries& entries, int64_t count);
  kernels::KvLayout layout_;
  PagePool pool_;
  std::map<int32_t, Entries> sequences_;
};

/// The cache of a model: one LayerCache a layer; routed layers also store positions. Not
/// thread-safe.
class RaggedCache {
 public:
  explicit RaggedCache(const model::ModelConfig& config);
  /// For model::ForwardOptions::caches.
  const std::vector<ops::KvStore*>& stores() const { return stores_; }
  const LayerCache& layer(int32_t l) const { return *layers_[l]; }
  /// After this the cache is as if only positions [0, num_positions) of the sequence had been seen.
  void Truncate(int32_t sequence, int64_t num_positions);
  void Remove(int32_t sequence);
  /// Pages handed out × page size, over all layers.
  int64_t bytes() const;

 private:
  std::vector<std::unique_ptr<LayerCache>> layers_;
  std::vector<ops::KvStore*> stores_;
};

}  // namespace detour::infer
