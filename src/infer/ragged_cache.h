// Keys and values of every layer, ragged: a routed layer holds the tokens that attended there and
// no others.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "model/model.h"
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

/// One layer of the cache. Entries of a sequence are in order of position, 16 to a page. With a
/// window of positions, entries of all rows live in `recent` until they are behind it, beside those
/// that stay.
class LayerCache : public ops::KvStore {
 public:
  explicit LayerCache(const kernels::KvLayout& layout, int64_t window = 0);
  ~LayerCache() override;
  Pages Extend(int32_t sequence, int64_t num_entries) override;
  KvStore* recent() override { return recent_.get(); }
  void Forget(int32_t sequence, int64_t entry) override;
  /// Drops entries at positions >= `num_positions`, and pages that hold no entry any more. CHECKs
  /// that nothing forgotten would be needed.
  void Truncate(int32_t sequence, int64_t num_positions);
  /// Whether Truncate can go back there.
  bool CanTruncate(int32_t sequence, int64_t num_positions) const;
  void Remove(int32_t sequence);
  /// Entries that stay, and those that a window holds beside them.
  int64_t num_entries(int32_t sequence) const;
  int64_t num_recent(int32_t sequence) const;
  int64_t bytes() const { return pool_.bytes_in_use() + (recent_ ? recent_->bytes() : 0); }
  const kernels::KvLayout& layout() const { return layout_; }

 private:
  struct Entries {
    std::vector<float*> pages;
    int64_t count = 0, first_page = 0;  // pages before that one were given back
  };
  void Shrink(Entries& entries, int64_t count);
  bool Forgotten(const Entries& entries, int64_t entry) const;
  int64_t CountBefore(const Entries& entries, int64_t num_positions) const;
  kernels::KvLayout layout_;
  PagePool pool_;
  std::map<int32_t, Entries> sequences_;
  int64_t readable_ = 0;  // of a `recent` cache: entries that the next row may look back
  std::unique_ptr<LayerCache> recent_;
};

/// The cache of a model: one LayerCache a layer (model::KvShapeOf). Not thread-safe.
class RaggedCache {
 public:
  explicit RaggedCache(const model::ModelConfig& config);
  /// For model::ForwardOptions::caches.
  const std::vector<ops::KvStore*>& stores() const { return stores_; }
  const LayerCache& layer(int32_t l) const { return *layers_[l]; }
  /// After this the cache is as if only positions [0, num_positions) of the sequence had been seen.
  /// A model with windows can be taken back by the last call's tokens and ops::kRollback more.
  void Truncate(int32_t sequence, int64_t num_positions);
  /// Whether it can be taken back that far.
  bool CanTruncate(int32_t sequence, int64_t num_positions) const;
  void Remove(int32_t sequence);
  /// Pages handed out × page size, over all layers.
  int64_t bytes() const;

 private:
  std::vector<std::unique_ptr<LayerCache>> layers_;
  std::vector<ops::KvStore*> stores_;
};

}  // namespace detour::infer
