// Scores, softmax and values of a tile of query rows over pages, once per SIMD target.
#if defined(DETOUR_KERNELS_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DETOUR_KERNELS_ATTENTION_INL_H_
#undef DETOUR_KERNELS_ATTENTION_INL_H_
#else
#define DETOUR_KERNELS_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <utility>

#include "kernels/kernels.h"
#include "kernels/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

constexpr int kPageVectors = static_cast<int>(kPageEntries) / kLanes;

/// The scores of one tile, [page][row][16], and what reads and writes them.
struct TileScores {
  float* p;
  int64_t rows;  // of the tile
  float* Page(int64_t page) const { return p + page * rows * kPageEntries; }
  int64_t PageFloats() const { return rows * kPageEntries; }
};

/// Scores of kRows queries against kVectors / kPageVectors pages.
template <int kRows, int kVectors>
HWY_INLINE void ScorePages(const float* q, int64_t dim, const float* const* keys, V scale,
                           float* scores) {
  constexpr int kPages = kVectors / kPageVectors;
  Tile<kRows, kVectors> tile;
  tile.Clear();
  tile.template Accumulate<kXStride, kPages>(q, dim, keys, kPageEntries, Whole());
  for (int page = 0; page < kPages; ++page) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kPageVectors; ++v) {
        hn::Store(hn::Mul(scale, tile.acc[r][page * kPageVectors + v]), d,
                  scores + (page * kRows + r) * kPageEntries + v * kLanes);
      }
    }
  }
}

/// Scores of kRows queries (rows of kXStride) against pages [0, num_pages), the keys at `k_at`.
template <int kRows>
void ScoreTile(const float* q, int64_t dim, const float* const* pages, int64_t k_at,
               int64_t num_pages, float scale, float* scores) {
  constexpr int kVectors = TileVectors(kRows);
  constexpr int kPages = kVectors / kPageVectors;
  const V scale_v = hn::Set(d, scale);
  int64_t page = 0;
  const float* keys[kPages];
  for (; page + kPages <= num_pages; page += kPages) {
    for (int i = 0; i < kPages; ++i) keys[i] = pages[page + i] + k_at;
    ScorePages<kRows, kVectors>(q, dim, keys, scale_v, scores + page * kRows * kPageEntries);
  }
  for (; page < num_pages; ++page) {
    keys[0] = pages[page] + k_at;
    ScorePages<kRows, kPageVectors>(q, dim, keys, scale_v, scores + page * kRows * kPageEntries);
  }
}

/// The values' part: out (rows of kXStride) (+)= p V over entries [begin, end), for one group of
/// columns, the values at `v_at` of each page.
template <int kRows, int kVectors, class Io>
HWY_INLINE void ValueColumns(const TileScores& scores, int64_t row, const float* const* pages,
                             int64_t v_at, int64_t dim, int64_t begin, int64_t end, bool first,
                             float* out, const Io& io) {
  Tile<kRows, kVectors> tile;
  tile.Load(out, kXStride, first);
  for (int64_t j = begin; j < end;) {
    const int64_t slot = j % kPageEntries, n = std::min(kPageEntries - slot, end - j);
    const float* values[1] = {pages[j / kPageEntries] + v_at + slot * dim};
    tile.template Accumulate<static_cast<int>(kPageEntries), 1>(
        scores.Page(j / kPageEntries) + row * kPageEntries + slot, n, values, dim, io);
    j += n;
  }
  tile.Store(out, kXStride);
}

/// All columns; `row` is the first of the kRows rows in the tile.
template <int kRows>
void ValueTile(const TileScores& scores, int64_t row, const float* const* pages, int64_t v_at,
               int64_t dim, int64_t begin, int64_t end, bool first, float* out) {
  constexpr int kVectors = TileVectors(kRows);
  int64_t c = 0;
  for (; c + kVectors * kLanes <= dim; c += kVectors * kLanes) {
    ValueColumns<kRows, kVectors>(scores, row, pages, v_at + c, dim, begin, end, first, out + c,
                                  Whole());
  }
  if constexpr (kVectors > 2) {
    for (; c + 2 * kLanes <= dim; c += 2 * kLanes) {
      ValueColumns<kRows, 2>(scores, row, pages, v_at + c, dim, begin, end, first, out + c,
                             Whole());
    }
  }
  for (; c < dim; c += kLanes) {
    const Part part(std::min<int64_t>(kLanes, dim - c));
    ValueColumns<kRows, 1>(scores, row, pages, v_at + c, dim, begin, end, first, out + c, part);
  }
}

using ScoreTileFn = decltype(&ScoreTile<1>);
using ValueTileFn = decltype(&ValueTile<1>);

template <int... kRows>
constexpr std::array<ScoreTileFn, kTileRows> ScoreTiles(std::integer_sequence<int, kRows...>) {
  return {&ScoreTile<kRows + 1>...};
}
template <int... kRows>
constexpr std::array<ValueTileFn, kTileRows> ValueTiles(std::integer_sequence<int, kRows...>) {
  return {&ValueTile<kRows + 1>...};
}
constexpr auto kRowsOfTiles = std::make_integer_sequence<int, kTileRows>();
constexpr auto kScoreTiles = ScoreTiles(kRowsOfTiles);
constexpr auto kValueTiles = ValueTiles(kRowsOfTiles);

/// Turns the scores that a row sees into exp(s − max), all others up to the last page's end into 0.
/// Returns the sum, and the maximum.
inline float SoftmaxRow(const TileScores& scores, int64_t row, const RowView& view,
                        float* max_out) {
  const int64_t num_pages = (view.end + kPageEntries - 1) / kPageEntries;
  const auto hide = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      scores.Page(j / kPageEntries)[row * kPageEntries + j % kPageEntries] =
          -std::numeric_limits<float>::infinity();
    }
  };
  hide(view.kept, view.begin);
  hide(view.end, num_pages * kPageEntries);
  Lanes max(-std::numeric_limits<float>::infinity());
  float* first = scores.p + row * kPageEntries;
  for (int64_t page = 0; page < num_pages; ++page) {
    const float* s = first + page * scores.PageFloats();
    for (int v = 0; v < kParts; ++v) {
      max.part[v] = hn::Max(max.part[v], hn::Load(d, s + v * kLanes));
    }
  }
  *max_out = MaxLanes(max);
  const V max_v = hn::Set(d, *max_out);
  Lanes sum(0.0f);
  for (int64_t page = 0; page < num_pages; ++page) {
    float* s = first + page * scores.PageFloats();
    for (int v = 0; v < kParts; ++v) {
      const V p = Exp(hn::Sub(hn::Load(d, s + v * kLanes), max_v));
      hn::Store(p, d, s + v * kLanes);
      sum.part[v] = hn::Add(sum.part[v], p);
    }
  }
  return SumLanes(sum);
}

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#endif  // DETOUR_KERNELS_ATTENTION_INL_H_
