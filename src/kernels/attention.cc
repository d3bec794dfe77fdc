// Attention over pages. Queries of one kv head are units u = row · (H/G) + head in group; a tile is
// up to 24 consecutive units against that head's pages, in register tiles of kTileRows. Which units
// share a tile changes no value.
// clang-format off
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "core/op_counter.h"
#include "core/threads.h"
#include "kernels/attention-inl.h"
#include "kernels/kernels.h"
#include "kernels/scratch.h"

#ifndef DETOUR_KERNELS_ATTENTION_ONCE
#define DETOUR_KERNELS_ATTENTION_ONCE
namespace detour::kernels {

/// The arguments of one Attend call.
struct AttendArgs {
  KvLayout layout;
  int64_t num_heads;
  float scale;
  const float* q;
  int64_t ldq;
  float* out;
  int64_t ldout;
  float* lse_RH;
};

/// Units [begin, end) of one segment and kv head.
struct AttendTile {
  const AttendSegment* segment;
  int64_t kv_head, begin, end;
};

}  // namespace detour::kernels
#endif  // DETOUR_KERNELS_ATTENTION_ONCE

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

// A call of RunAttendTile takes several register tiles through the pages together, a chunk of pages
// at a time, so that what one tile brings into the cache serves them all.
constexpr int64_t kTilesTogether = 24 / kTileRows;
constexpr int64_t kChunkPages = 16;

/// One register tile of units [begin, begin + rows). `common`: what every row of it sees.
struct RegisterTile {
  int64_t begin, rows, num_pages;
  RowView common;
  TileScores scores;
  float *q, *out;
};

/// Query heads of a tile's units: unit u is row u / group, head first_head + u % group.
struct TileHeads {
  int64_t kv_head, first_head, group;
  TileHeads(const AttendArgs& args, const AttendTile& t) {
    group = args.num_heads / args.layout.num_kv_heads;
    kv_head = t.kv_head;
    first_head = kv_head * group;
    if (const int64_t head = t.segment->head; head >= 0) {
      kv_head = head / group;
      first_head = head;
      group = 1;
    }
  }
};

/// The units [begin, end) as a register tile; its floats are not set.
RegisterTile MakeTile(const AttendSegment& segment, int64_t group, int64_t begin, int64_t end) {
  RegisterTile tile{.begin = begin, .rows = end - begin};
  RowView common = segment.View(begin / group);
  int64_t last = common.end;
  for (int64_t row = begin / group + 1; segment.views && row <= (end - 1) / group; ++row) {
    const RowView view = segment.View(row);
    common = {std::min(common.kept, view.kept), std::max(common.begin, view.begin),
              std::min(common.end, view.end)};
    last = std::max(last, view.end);
  }
  if (!segment.views) last = segment.View((end - 1) / group).end;
  tile.common = common;
  tile.num_pages = (last + kPageEntries - 1) / kPageEntries;
  return tile;
}

/// The values' part of a tile whose rows see different entries: what all see together, the rest row
/// by row, each row's entries in ascending order.
void ValuesOfViews(const AttendSegment& segment, const RegisterTile& tile, int64_t group,
                   int64_t v_at, int64_t dim) {
  std::memset(tile.out, 0, tile.rows * kXStride * sizeof(float));
  const auto together = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    kValueTiles[tile.rows - 1](tile.scores, 0, segment.pages, v_at, dim, begin, end, false,
                               tile.out);
  };
  const auto alone = [&](int64_t r, int64_t begin, int64_t end) {
    if (begin >= end) return;
    kValueTiles[0](tile.scores, r, segment.pages, v_at, dim, begin, end, false,
                   tile.out + r * kXStride);
  };
  const int64_t middle = tile.common.begin, last = std::max(middle, tile.common.end);
  together(0, tile.common.kept);
  for (int64_t r = 0; r < tile.rows; ++r) {
    const RowView view = segment.View((tile.begin + r) / group);
    alone(r, tile.common.kept, view.kept);
    alone(r, view.begin, std::min(middle, view.end));
  }
  together(middle, last);
  for (int64_t r = 0; r < tile.rows; ++r) {
    alone(r, last, segment.View((tile.begin + r) / group).end);
  }
}

void FinishTile(const AttendArgs& args, const AttendTile& t, const RegisterTile& tile,
                const float* sum, const float* max) {
  const AttendSegment& segment = *t.segment;
  const TileHeads heads(args, t);
  const int64_t dim = args.layout.head_dim;
  const int64_t v_at = (args.layout.num_kv_heads + heads.kv_head) * dim * kPageEntries;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t u = tile.begin + r, row = segment.row_begin + u / heads.group;
    const int64_t head = heads.first_head + u % heads.group;
    const int64_t limit = segment.View(u / heads.group).end;
    float* out = tile.out + r * kXStride;
    if (!segment.views && limit > tile.common.end) {
      kValueTiles[0](tile.scores, r, segment.pages, v_at, dim, tile.common.end, limit, false, out);
    }
    float* to = args.out + row * args.ldout + head * dim;
    for (int64_t i = 0; i < dim; ++i) to[i] = out[i] / sum[r];
    if (args.lse_RH) {
      args.lse_RH[row * args.num_heads + head] =
          static_cast<float>(max[r] + std::log(static_cast<double>(sum[r])));
    }
  }
}

void RunAttendTile(const AttendArgs& args, const AttendTile& t) {
  const AttendSegment& segment = *t.segment;
  const TileHeads heads(args, t);
  const int64_t dim = args.layout.head_dim, group = heads.group;
  const int64_t k_at = heads.kv_head * dim * kPageEntries;
  const int64_t v_at = k_at + args.layout.num_kv_heads * dim * kPageEntries;
  const int64_t units = t.end - t.begin, num_tiles = (units + kTileRows - 1) / kTileRows;

  RegisterTile tiles[kTilesTogether];
  int64_t num_pages = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    tiles[i] = MakeTile(segment, group, t.begin + units * i / num_tiles,
                        t.begin + units * (i + 1) / num_tiles);
    num_pages = std::max(num_pages, tiles[i].num_pages);
  }
  float* q = ScratchFloats(units * (2 * kXStride + num_pages * kPageEntries));
  for (int64_t i = 0; i < num_tiles; ++i) {
    RegisterTile& tile = tiles[i];
    const int64_t first = tile.begin - t.begin;
    tile.q = q + first * kXStride;
    tile.out = q + (units + first) * kXStride;
    tile.scores = {q + 2 * units * kXStride + first * num_pages * kPageEntries, tile.rows};
  }
  for (int64_t u = t.begin; u < t.end; ++u) {
    const int64_t row = segment.row_begin + u / group, head = heads.first_head + u % group;
    std::memcpy(q + (u - t.begin) * kXStride, args.q + row * args.ldq + head * dim,
                dim * sizeof(float));
  }
  for (int64_t page = 0; page < num_pages; page += kChunkPages) {
    for (int64_t i = 0; i < num_tiles; ++i) {
      const RegisterTile& tile = tiles[i];
      const int64_t n = std::min(kChunkPages, tile.num_pages - page);
      if (n <= 0) continue;
      kScoreTiles[tile.rows - 1](tile.q, dim, segment.pages + page, k_at, n, args.scale,
                                 tile.scores.Page(page));
    }
  }
  float sum[kTilesTogether][kTileRows], max[kTilesTogether][kTileRows];
  for (int64_t i = 0; i < num_tiles; ++i) {
    for (int64_t r = 0; r < tiles[i].rows; ++r) {
      sum[i][r] =
          SoftmaxRow(tiles[i].scores, r, segment.View((tiles[i].begin + r) / group), &max[i][r]);
    }
  }
  constexpr int64_t kChunkEntries = kChunkPages * kPageEntries;
  for (int64_t j = 0; !segment.views && j < tiles[num_tiles - 1].common.end; j += kChunkEntries) {
    for (int64_t i = 0; i < num_tiles; ++i) {
      const RegisterTile& tile = tiles[i];
      const int64_t end = std::min(j + kChunkEntries, tile.common.end);
      if (j >= end) continue;
      kValueTiles[tile.rows - 1](tile.scores, 0, segment.pages, v_at, dim, j, end, j == 0,
                                 tile.out);
    }
  }
  for (int64_t i = 0; i < num_tiles; ++i) {
    if (segment.views) ValuesOfViews(segment, tiles[i], group, v_at, dim);
    FinishTile(args, t, tiles[i], sum[i], max[i]);
  }
}

int64_t AttendTileRows() { return kTileRows * kTilesTogether; }

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace detour::kernels {

void WriteKv(const KvLayout& layout, float* page, int64_t slot, const float* k_GK,
             const float* v_GK, int32_t position) {
  WriteKvRows(layout, &page, slot, 1, k_GK, 0, v_GK, 0, &position);
}

namespace {

/// The sums of keys that pages [begin, end), all full now, end with.
void SumBlocks(const KvLayout& layout, float* const* pages, int64_t begin, int64_t end) {
  const int64_t width = layout.num_kv_heads * layout.head_dim;
  for (int64_t p = begin; p < end; ++p) {
    float* sums = pages[p] + layout.SumsAt();
    const float* before = p % layout.block_pages > 0 ? pages[p - 1] + layout.SumsAt() : nullptr;
    for (int64_t i = 0; i < width; ++i) {
      float sum = before ? before[i] : 0;
      for (int64_t e = 0; e < kPageEntries; ++e) sum += pages[p][i * kPageEntries + e];
      sums[i] = sum;
    }
  }
}

}  // namespace

void WriteKvRows(const KvLayout& layout, float* const* pages, int64_t first_entry, int64_t num_rows,
                 const float* k, int64_t ldk, const float* v, int64_t ldv,
                 const int32_t* positions) {
  if (num_rows == 0) return;
  const int64_t dim = layout.head_dim, width = layout.num_kv_heads * dim;
  const int64_t end_entry = first_entry + num_rows;
  const int64_t grain = std::max<int64_t>(1, (1 << 13) / (width * kPageEntries));
  const auto write_page = [&](int64_t p) {
    const int64_t begin = std::max(first_entry, p * kPageEntries);
    const int64_t n = std::min(end_entry, (p + 1) * kPageEntries) - begin;
    const int64_t slot = begin % kPageEntries, row = begin - first_entry;
    float* keys = pages[p] + slot;
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t e = 0; e < n; ++e) keys[i * kPageEntries + e] = k[(row + e) * ldk + i];
    }
    float* values = pages[p] + width * kPageEntries;
    for (int64_t g = 0; g < layout.num_kv_heads; ++g) {
      for (int64_t e = 0; e < n; ++e) {
        std::memcpy(values + (g * kPageEntries + slot + e) * dim, v + (row + e) * ldv + g * dim,
                    dim * sizeof(float));
      }
    }
    if (layout.with_positions) {
      std::memcpy(pages[p] + layout.PositionsAt() + slot, positions + row, n * sizeof(int32_t));
    }
  };
  ParallelFor(first_entry / kPageEntries, (end_entry + kPageEntries - 1) / kPageEntries, grain,
              [&](int64_t begin, int64_t end) {
                for (int64_t p = begin; p < end; ++p) write_page(p);
              });
  if (layout.block_pages > 0) {
    SumBlocks(layout, pages, first_entry / kPageEntries, end_entry / kPageEntries);
  }
}

namespace {

/// (query row, head, key) triples; also checks the segments.
int64_t VisitedKeys(std::span<const AttendSegment> segments, int64_t num_heads) {
  int64_t visited = 0;
  for (const AttendSegment& s : segments) {
    const int64_t heads = s.head < 0 ? num_heads : 1;
    for (int64_t i = 0; s.views && i < s.num_rows; ++i) {
      const auto& [kept, begin, end] = s.views[i];
      DETOUR_CHECK(0 <= kept && kept <= begin && begin <= end && kept + end > begin,
                   "a row sees entries [0, {}) and [{}, {})", kept, begin, end);
      visited += heads * (kept + end - begin);
    }
    if (s.views) continue;
    DETOUR_CHECK(s.num_rows >= 0 && (s.num_rows == 0 || s.first_limit >= 1),
                 "{} rows, the first of which sees {} entries", s.num_rows, s.first_limit);
    visited += heads * (s.num_rows * s.first_limit + s.num_rows * (s.num_rows - 1) / 2);
  }
  return visited;
}

}  // namespace

void Attend(const KvLayout& layout, int64_t num_heads, float scale, const float* q, int64_t ldq,
            std::span<const AttendSegment> segments, float* out, int64_t ldout, float* lse_RH) {
  const int64_t kv_heads = layout.num_kv_heads, dim = layout.head_dim;
  DETOUR_CHECK(kv_heads >= 1 && num_heads >= kv_heads && num_heads % kv_heads == 0 && dim >= 1 &&
                   dim <= kMaxHeadDim,
               "{} heads, {} kv heads, head_dim {} of at most {}", num_heads, kv_heads, dim,
               kMaxHeadDim);
  const int64_t visited = VisitedKeys(segments, num_heads), group = num_heads / kv_heads;
  const int64_t flops = 4 * dim * visited;
  GlobalOpCounter().visited_keys.fetch_add(visited / num_heads, std::memory_order_relaxed);
  GlobalOpCounter().attention_flops.fetch_add(flops, std::memory_order_relaxed);

  // Tiles of each (segment, kv head), the last rows first: those are the longest.
  const int64_t tile_rows = DETOUR_DISPATCH(AttendTileRows)();
  const auto units_of = [&](const AttendSegment& s) {
    return s.num_rows * (s.head < 0 ? group : 1);
  };
  const auto tiles_of = [&](const AttendSegment& s) {
    return (units_of(s) + tile_rows - 1) / tile_rows;
  };
  thread_local std::vector<int64_t> first_tile_of;
  std::vector<int64_t>& first_tile = first_tile_of;  // a lambda would name its own thread's
  first_tile.assign(1, 0);
  for (const AttendSegment& s : segments) {
    first_tile.push_back(first_tile.back() + tiles_of(s) * (s.head < 0 ? kv_heads : 1));
  }
  const AttendArgs args{layout, num_heads, scale, q, ldq, out, ldout, lse_RH};
  const auto run = DETOUR_DISPATCH(RunAttendTile);
  const auto run_tile = [&](int64_t i) {
    const int64_t s =
        std::upper_bound(first_tile.begin(), first_tile.end(), i) - first_tile.begin() - 1;
    const AttendSegment& segment = segments[s];
    const int64_t num_tiles = tiles_of(segment), units = units_of(segment);
    const int64_t head = (i - first_tile[s]) / num_tiles;
    const int64_t tile = num_tiles - 1 - (i - first_tile[s]) % num_tiles;
    run(args, {&segment, head, units * tile / num_tiles, units * (tile + 1) / num_tiles});
  };
  // One range per thread, which takes tiles from a common counter: tiles differ in length.
  constexpr int64_t kMinThreadFlops = 1 << 18;
  const int64_t num_ranges = std::clamp<int64_t>(
      std::min<int64_t>(flops / kMinThreadFlops, first_tile.back()), 1, NumThreads());
  std::atomic<int64_t> next{0};
  ParallelFor(0, num_ranges, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < first_tile.back();) {
      run_tile(i);
    }
  });
}

}  // namespace detour::kernels
#endif  // HWY_ONCE
