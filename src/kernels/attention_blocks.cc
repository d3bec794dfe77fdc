// Attention among blocks that each query head chose. Queries that chose the same block pass over it
// together: scores block by block into each query's own row, softmax row by row, values block by
// block in ascending order. Each query's operations are those of Attend over a table of its blocks.
// clang-format off
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention_blocks.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "core/error.h"
#include "core/op_counter.h"
#include "core/threads.h"
#include "kernels/attention-inl.h"
#include "kernels/kernels.h"
#include "kernels/scratch.h"

#ifndef DETOUR_KERNELS_ATTENTION_BLOCKS_ONCE
#define DETOUR_KERNELS_ATTENTION_BLOCKS_ONCE
namespace detour::kernels {

/// The arguments of one AttendBlocks call.
struct BlockArgs {
  KvLayout layout;
  int64_t num_heads;
  float scale;
  const float* q;
  int64_t ldq;
  BlockSegment segment;
  float* out;
  int64_t ldout;
  float* lse_RH;
};

/// Query `unit` of a task (row · group + head of the group) chose a block as the `place`-th of its.
struct BlockUser {
  int32_t unit, place;
};

}  // namespace detour::kernels
#endif  // DETOUR_KERNELS_ATTENTION_BLOCKS_ONCE

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

/// Rows [row_begin, row_end) of a segment against one kv head, and their working memory.
struct BlockTask {
  const BlockArgs& args;
  int64_t kv_head, row_begin, row_end;
  int64_t group = args.num_heads / args.layout.num_kv_heads;
  int64_t num_units = (row_end - row_begin) * group, dim = args.layout.head_dim;
  int64_t block_pages = args.layout.block_pages, block_size = block_pages * kPageEntries;
  int64_t score_floats = args.segment.top * block_size;  // of a unit
  float *tile_x, *tile_y, *scores, *out;
  std::vector<std::vector<BlockUser>> users;  // of each block

  int64_t Row(int64_t unit) const { return row_begin + unit / group; }
  int64_t Head(int64_t unit) const { return kv_head * group + unit % group; }
  /// Place of the row's own entry in its block.
  int64_t Own(int64_t unit) const { return (args.segment.first_entry + Row(unit)) % block_size; }
  bool IsOwn(const BlockUser& user) const { return user.place == args.segment.top - 1; }
  const float* Query(int64_t unit) const {
    return args.q + (args.segment.row_begin + Row(unit)) * args.ldq + Head(unit) * dim;
  }

  void Allocate() {
    const int64_t tile_floats = kTileRows * std::max<int64_t>(kXStride, block_size);
    tile_x = ScratchFloats(2 * tile_floats + num_units * (score_floats + kXStride));
    tile_y = tile_x + tile_floats;
    scores = tile_y + tile_floats;
    out = scores + num_units * score_floats;
  }

  void FindUsers() {
    const BlockSegment& s = args.segment;
    for (int64_t u = 0; u < num_units; ++u) {
      const int32_t* chosen = s.chosen_RHT + (Row(u) * args.num_heads + Head(u)) * s.top;
      for (int64_t t = 0; t < s.top; ++t) {
        if (chosen[t] >= std::ssize(users)) users.resize(chosen[t] + 1);
        users[chosen[t]].push_back({static_cast<int32_t>(u), static_cast<int32_t>(t)});
      }
    }
  }

  /// body(block, its users) for tiles of at most kTileRows users, blocks ascending. Users whose own
  /// block it is come first, and share no tile with the others, who see all of it.
  template <class Body>
  void ForEachTile(const Body& body) const {
    for (int64_t block = 0; block < std::ssize(users); ++block) {
      const std::span<const BlockUser> all = users[block];
      for (size_t i = 0, end = 0; i < all.size(); i = end) {
        const bool own = IsOwn(all[i]);
        while (end < all.size() && end - i < kTileRows && IsOwn(all[end]) == own) ++end;
        body(block, all.subspan(i, end - i));
      }
    }
  }

  void ScoreBlock(int64_t block, std::span<const BlockUser> tile) const {
    // Of a row's own block only the pages up to its entry are there.
    int64_t num_pages = 1;
    for (size_t r = 0; r < tile.size(); ++r) {
      const int64_t unit = tile[r].unit;
      std::memcpy(tile_x + r * kXStride, Query(unit), dim * sizeof(float));
      num_pages = std::max(num_pages, IsOwn(tile[r]) ? Own(unit) / kPageEntries + 1 : block_pages);
    }
    const int64_t k_at = kv_head * dim * kPageEntries;
    kScoreTiles[tile.size() - 1](tile_x, dim, args.segment.pages + block * block_pages, k_at,
                                 num_pages, args.scale, tile_y);
    const auto rows = std::ssize(tile);
    for (int64_t r = 0; r < rows; ++r) {
      float* to = scores + tile[r].unit * score_floats + tile[r].place * block_size;
      for (int64_t page = 0; page < num_pages; ++page) {
        std::memcpy(to + page * kPageEntries, tile_y + (page * rows + r) * kPageEntries,
                    kPageEntries * sizeof(float));
      }
    }
  }

  /// Adds the values of entries [begin, end) of a block to the tile's rows from `first` on.
  void AddValues(int64_t block, int64_t rows, int64_t first, int64_t count, int64_t begin,
                 int64_t end) const {
    if (begin >= end) return;
    const int64_t v_at = (args.layout.num_kv_heads + kv_head) * dim * kPageEntries;
    kValueTiles[count - 1]({tile_y, rows}, first, args.segment.pages + block * block_pages, v_at,
                           dim, begin, end, false, tile_x + first * kXStride);
  }

  void ValueBlock(int64_t block, std::span<const BlockUser> tile) const {
    const auto rows = std::ssize(tile);
    int64_t common = block_size;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t unit = tile[r].unit;
      const float* from = scores + unit * score_floats + tile[r].place * block_size;
      const int64_t used = IsOwn(tile[r]) ? Own(unit) + 1 : block_size;
      common = std::min(common, used);
      for (int64_t page = 0; page * kPageEntries < used; ++page) {
        std::memcpy(tile_y + (page * rows + r) * kPageEntries, from + page * kPageEntries,
                    kPageEntries * sizeof(float));
      }
      std::memcpy(tile_x + r * kXStride, out + unit * kXStride, dim * sizeof(float));
    }
    AddValues(block, rows, 0, rows, 0, common);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t unit = tile[r].unit;
      if (IsOwn(tile[r])) AddValues(block, rows, r, 1, common, Own(unit) + 1);
      std::memcpy(out + unit * kXStride, tile_x + r * kXStride, dim * sizeof(float));
    }
  }

  void Finish(int64_t unit, float sum, float max) const {
    const int64_t row = args.segment.row_begin + Row(unit), head = Head(unit);
    float* to = args.out + row * args.ldout + head * dim;
    for (int64_t i = 0; i < dim; ++i) to[i] = out[unit * kXStride + i] / sum;
    if (args.lse_RH) {
      args.lse_RH[row * args.num_heads + head] =
          static_cast<float>(max + std::log(static_cast<double>(sum)));
    }
  }
};

void RunBlockTask(const BlockArgs& args, int64_t kv_head, int64_t row_begin, int64_t row_end) {
  BlockTask task{args, kv_head, row_begin, row_end};
  task.Allocate();
  task.FindUsers();
  task.ForEachTile(
      [&](int64_t block, std::span<const BlockUser> tile) { task.ScoreBlock(block, tile); });
  std::vector<float> sum(task.num_units), max(task.num_units);
  for (int64_t u = 0; u < task.num_units; ++u) {
    const int64_t end = (args.segment.top - 1) * task.block_size + task.Own(u) + 1;
    sum[u] = SoftmaxRow({task.scores + u * task.score_floats, 1}, 0, {0, 0, end}, &max[u]);
    std::fill_n(task.out + u * kXStride, task.dim, 0.0f);
  }
  task.ForEachTile(
      [&](int64_t block, std::span<const BlockUser> tile) { task.ValueBlock(block, tile); });
  for (int64_t u = 0; u < task.num_units; ++u) task.Finish(u, sum[u], max[u]);
}

/// scores [num_rows][num_blocks] of the queries at q (row stride ldq), by blocks of 16 sums.
void RunScoreBlocks(const float* q, int64_t ldq, int64_t num_rows, int64_t dim,
                    const float* const* sums, int64_t num_blocks, float* scores) {
  const int64_t num_pages = (num_blocks + kPageEntries - 1) / kPageEntries;
  float* x = ScratchFloats(kTileRows * (kXStride + num_pages * kPageEntries));
  float* y = x + kTileRows * kXStride;
  for (int64_t first = 0; first < num_rows; first += kTileRows) {
    const int64_t rows = std::min<int64_t>(kTileRows, num_rows - first);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(x + r * kXStride, q + (first + r) * ldq, dim * sizeof(float));
    }
    kScoreTiles[rows - 1](x, dim, sums, 0, num_pages, 1.0f, y);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t b = 0; b < num_blocks; b += kPageEntries) {
        std::memcpy(scores + (first + r) * num_blocks + b,
                    y + (b / kPageEntries * rows + r) * kPageEntries,
                    std::min(kPageEntries, num_blocks - b) * sizeof(float));
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace detour::kernels {

void ScoreBlocks(const KvLayout& layout, int64_t num_heads, const float* q, int64_t ldq,
                 int64_t num_rows, const float* const* pages, int64_t num_blocks,
                 float* scores_HRB) {
  const int64_t dim = layout.head_dim, group = num_heads / layout.num_kv_heads;
  const int64_t num_pages = (num_blocks + kPageEntries - 1) / kPageEntries;
  const auto run = DETOUR_DISPATCH(RunScoreBlocks);
  // The sums as the keys of pages, of one kv head after the other.
  std::vector<float> sums(layout.num_kv_heads * num_pages * dim * kPageEntries);
  std::vector<const float*> tables;
  for (int64_t p = 0; p < layout.num_kv_heads * num_pages; ++p) {
    tables.push_back(&sums[p * dim * kPageEntries]);
  }
  for (int64_t i = 0; i < layout.num_kv_heads * num_blocks; ++i) {
    const int64_t kv_head = i / num_blocks, b = i % num_blocks;
    const float* from = pages[(b + 1) * layout.block_pages - 1] + layout.SumsAt() + kv_head * dim;
    const int64_t page = kv_head * num_pages + b / kPageEntries;
    float* to = &sums[page * dim * kPageEntries + b % kPageEntries];
    for (int64_t k = 0; k < dim; ++k) to[k * kPageEntries] = from[k];
  }
  ParallelFor(0, num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      run(q + head * dim, ldq, num_rows, dim, tables.data() + head / group * num_pages, num_blocks,
          scores_HRB + head * num_rows * num_blocks);
    }
  });
}

void AttendBlocks(const KvLayout& layout, int64_t num_heads, float scale, const float* q,
                  int64_t ldq, const BlockSegment& segment, float* out, int64_t ldout,
                  float* lse_RH) {
  const int64_t block_size = layout.block_pages * kPageEntries;
  DETOUR_CHECK(block_size > 0 && segment.top >= 1 && layout.head_dim <= kMaxHeadDim);
  int64_t visited = 0;
  for (int64_t r = 0; r < segment.num_rows; ++r) {
    visited += (segment.top - 1) * block_size + (segment.first_entry + r) % block_size + 1;
  }
  GlobalOpCounter().visited_keys.fetch_add(visited, std::memory_order_relaxed);
  GlobalOpCounter().attention_flops.fetch_add(4 * layout.head_dim * num_heads * visited,
                                              std::memory_order_relaxed);
  // So many rows that a block serves several of them, and that their scores fit the cache.
  const int64_t group = num_heads / layout.num_kv_heads;
  const int64_t fitting = (256 << 10) / (group * segment.top * block_size);
  const int64_t rows = std::clamp<int64_t>(fitting, 16, 128);
  const int64_t parts = (segment.num_rows + rows - 1) / rows;
  const BlockArgs args{layout, num_heads, scale, q, ldq, segment, out, ldout, lse_RH};
  const auto run = DETOUR_DISPATCH(RunBlockTask);
  ParallelFor(0, parts * layout.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / layout.num_kv_heads;
      run(args, i % layout.num_kv_heads, segment.num_rows * part / parts,
          segment.num_rows * (part + 1) / parts);
    }
  });
}

}  // namespace detour::kernels
#endif  // HWY_ONCE
