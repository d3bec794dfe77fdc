// Gradients of attention. Per segment: keys and values are packed once per kv head; then each query
// head walks over blocks of its rows and chunks of the entries they see, and keeps sums of its own
// for every entry; at the end the sums of a kv head's query heads are added in their order.
// clang-format off
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention_backward.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "kernels/scratch.h"
#include "kernels/tile-inl.h"

#ifndef DETOUR_KERNELS_ATTENTION_BACKWARD_ONCE
#define DETOUR_KERNELS_ATTENTION_BACKWARD_ONCE
namespace detour::kernels {

/// Entries that are masked, and products that are cut, together.
inline constexpr int64_t kGradPanel = 32;

/// One kv head's entries of a segment, their number rounded up to panels with zeros: Kᵀ and Vᵀ in
/// panels [K][32], and K in rows of `width`, the head's numbers rounded up to 32.
struct GradKeys {
  int64_t num_entries, num_panels, width;
  const float *k_t, *v_t, *k;
};

/// What one query head adds to: [entries][width] each, zero at first.
struct GradSums {
  float *dk, *dv;
};

}  // namespace detour::kernels
#endif  // DETOUR_KERNELS_ATTENTION_BACKWARD_ONCE

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

constexpr int64_t kBlockRows = 96;
constexpr int64_t kChunkPanels = 8;
constexpr int kStep = 2 * kLanes;  // columns of a tile
static_assert(kGradPanel % kStep == 0 && kChunkPanels * kGradPanel <= kMaxDepth);

/// y[r][0, kStep) (+)= Σ_k x(r, k) w[k · step], where x(r, k) is at x[r · kXStride + k], or
/// transposed at x[k · kXStride + r].
template <bool kTransposed, int kRows>
void ProductTile(const float* x, int64_t n, const float* w, int64_t step, bool first, float* y,
                 int64_t ldy) {
  Tile<kRows, 2> tile;
  tile.Load(y, ldy, first);
  const float* const pointers[1] = {w};
  if constexpr (kTransposed) {
    tile.template Accumulate<1, 1, kXStride>(x, n, pointers, step, Whole());
  } else {
    tile.template Accumulate<kXStride, 1>(x, n, pointers, step, Whole());
  }
  tile.Store(y, ldy);
}

template <bool kTransposed, int... kRows>
constexpr std::array<decltype(&ProductTile<kTransposed, 1>), kTileRows> ProductTiles(
    std::integer_sequence<int, kRows...>) {
  return {&ProductTile<kTransposed, kRows + 1>...};
}
template <bool kTransposed>
constexpr auto kProductTiles =
    ProductTiles<kTransposed>(std::make_integer_sequence<int, kTileRows>());

/// y [rows][width] (+)= x w, w [n][·] with row stride `step`; width is a multiple of kStep.
template <bool kTransposed>
void Product(const float* x, int64_t rows, int64_t n, const float* w, int64_t step, int64_t width,
             bool first, float* y, int64_t ldy) {
  const int64_t num_tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t c = 0; c < width; c += kStep) {
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t r = rows * t / num_tiles, end = rows * (t + 1) / num_tiles;
      kProductTiles<kTransposed>[end - r - 1](x + r * (kTransposed ? 1 : kXStride), n, w + c, step,
                                              first, y + r * ldy + c, ldy);
    }
  }
}

/// Rows of one query head, and what they need of it: rows of kXStride, zero from K to `width`.
struct GradRows {
  int64_t first, count;  // rows of the segment
  float *q, *dout, *dq;
  float *p, *ds;  // weights and their gradients against a chunk of entries
  float lse[kBlockRows], delta[kBlockRows];
};

/// Whether any, and whether every row of a block sees entries [begin, end).
struct Sights {
  bool any = false, all = true;
};
Sights SightsOf(const AttendGradSegment& segment, const GradRows& rows, int64_t begin,
                int64_t end) {
  Sights sights;
  for (int64_t r = 0; r < rows.count; ++r) {
    const RowView view = segment.View(rows.first + r);
    const bool late = end > view.begin && begin < view.end;
    sights.any |= begin < view.kept || late;
    sights.all &= end <= view.kept || (begin >= view.begin && end <= view.end);
  }
  return sights;
}

/// p and ds of one row against one panel, whose first entry is `entry`; both hold q·k and dO·v.
void WeighPanel(const RowView& view, int64_t entry, bool all, float scale, float lse, float delta,
                float* p, float* ds) {
  const V scale_v = hn::Set(d, scale), lse_v = hn::Set(d, lse), delta_v = hn::Set(d, delta);
  for (int64_t i = 0; i < kGradPanel; i += kLanes) {
    // What a row does not see may exceed its maximum by far: its weight is set, not computed.
    const V weight = Exp(hn::Sub(hn::Mul(scale_v, hn::LoadU(d, p + i)), lse_v));
    hn::StoreU(weight, d, p + i);
    const V change = hn::Mul(hn::Sub(hn::LoadU(d, ds + i), delta_v), scale_v);
    hn::StoreU(hn::Mul(weight, change), d, ds + i);
  }
  for (int64_t i = 0; !all && i < kGradPanel; ++i) {
    const int64_t j = entry + i;
    if (j < view.kept || (j >= view.begin && j < view.end)) continue;
    p[i] = ds[i] = 0;
  }
}

/// Panels [panel, panel_end), which some row sees, for one block of rows.
void AddPanels(const AttendGradArgs& args, const AttendGradSegment& segment, const GradKeys& keys,
               int64_t panel, int64_t panel_end, GradRows& rows, const GradSums& sums) {
  const int64_t dim = args.head_dim, width = keys.width;
  for (int64_t i = panel; i < panel_end; ++i) {
    float* p = rows.p + (i - panel) * kGradPanel;
    float* ds = rows.ds + (i - panel) * kGradPanel;
    Product<false>(rows.q, rows.count, dim, keys.k_t + i * dim * kGradPanel, kGradPanel, kGradPanel,
                   true, p, kXStride);
    Product<false>(rows.dout, rows.count, dim, keys.v_t + i * dim * kGradPanel, kGradPanel,
                   kGradPanel, true, ds, kXStride);
    const bool all = SightsOf(segment, rows, i * kGradPanel, (i + 1) * kGradPanel).all;
    for (int64_t r = 0; r < rows.count; ++r) {
      WeighPanel(segment.View(rows.first + r), i * kGradPanel, all, args.scale, rows.lse[r],
                 rows.delta[r], p + r * kXStride, ds + r * kXStride);
    }
  }
  const int64_t entry = panel * kGradPanel, n = (panel_end - panel) * kGradPanel;
  Product<false>(rows.ds, rows.count, n, keys.k + entry * width, width, width, false, rows.dq,
                 kXStride);
  Product<true>(rows.ds, n, rows.count, rows.q, kXStride, width, false, sums.dk + entry * width,
                width);
  Product<true>(rows.p, n, rows.count, rows.dout, kXStride, width, false, sums.dv + entry * width,
                width);
}

void LoadRows(const AttendGradArgs& args, const AttendGradSegment& segment, int64_t head,
              int64_t width, GradRows* rows) {
  const int64_t dim = args.head_dim, stride = args.num_heads * dim;
  for (int64_t r = 0; r < rows->count; ++r) {
    const int64_t row = segment.Row(head, rows->first + r), at = row * stride + head * dim;
    std::memcpy(rows->q + r * kXStride, args.q + at, dim * sizeof(float));
    std::memcpy(rows->dout + r * kXStride, args.dout + at, dim * sizeof(float));
    for (float* x : {rows->q, rows->dout}) {
      std::fill(x + r * kXStride + dim, x + r * kXStride + width, 0.0f);
    }
    std::fill_n(rows->dq + r * kXStride, width, 0.0f);
    Lanes delta(0.0f);
    SweepLanes(dim, delta, [&](const auto& io, int64_t i, V& lane) {
      lane = hn::MulAdd(io.Load(args.dout + at + i), io.Load(args.out + at + i), lane);
    });
    rows->delta[r] = SumLanes(delta);
    rows->lse[r] = args.lse_RH[row * args.num_heads + head];
  }
}

/// One query head of one segment.
void RunGradHead(const AttendGradArgs& args, const AttendGradSegment& segment, const GradKeys& keys,
                 int64_t head, const GradSums& sums) {
  float* scratch = ScratchFloats(5 * kBlockRows * kXStride);
  const auto buffer = [&](int64_t i) { return scratch + i * kBlockRows * kXStride; };
  GradRows rows{0, 0, buffer(0), buffer(1), buffer(2), buffer(3), buffer(4)};
  const int64_t num_rows = segment.NumRows(head);
  const int64_t num_blocks = (num_rows + kBlockRows - 1) / kBlockRows;
  for (int64_t b = 0; b < num_blocks; ++b) {
    rows.first = num_rows * b / num_blocks;
    rows.count = num_rows * (b + 1) / num_blocks - rows.first;
    LoadRows(args, segment, head, keys.width, &rows);
    for (int64_t panel = 0; panel < keys.num_panels;) {
      const auto seen = [&](int64_t i) {
        return SightsOf(segment, rows, i * kGradPanel, (i + 1) * kGradPanel).any;
      };
      int64_t end = panel;
      while (end < keys.num_panels && end - panel < kChunkPanels && seen(end)) ++end;
      if (end > panel) AddPanels(args, segment, keys, panel, end, rows, sums);
      panel = std::max(end, panel + 1);
    }
    const int64_t dim = args.head_dim, stride = args.num_heads * dim;
    for (int64_t r = 0; r < rows.count; ++r) {
      float* dq = args.dq + segment.Row(head, rows.first + r) * stride + head * dim;
      for (int64_t i = 0; i < dim; ++i) dq[i] += rows.dq[r * kXStride + i];
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace detour::kernels {
namespace {

/// Entries [begin, end) of one kv head into its arrays.
void PackEntries(const AttendGradArgs& args, const AttendGradSegment& segment, int64_t kv_head,
                 int64_t width, int64_t begin, int64_t end, float* k_t, float* v_t, float* k) {
  const int64_t dim = args.head_dim, stride = args.num_kv_heads * dim;
  for (int64_t e = begin; e < end; ++e) {
    float* row = k + e * width;
    const int64_t at = e / kGradPanel * dim * kGradPanel + e % kGradPanel;
    if (e >= segment.num_entries) {
      std::fill_n(row, width, 0.0f);
      for (int64_t i = 0; i < dim; ++i) k_t[at + i * kGradPanel] = v_t[at + i * kGradPanel] = 0;
      continue;
    }
    const float* from_k = args.k + segment.Entry(e) * stride + kv_head * dim;
    const float* from_v = args.v + segment.Entry(e) * stride + kv_head * dim;
    std::memcpy(row, from_k, dim * sizeof(float));
    std::fill(row + dim, row + width, 0.0f);
    for (int64_t i = 0; i < dim; ++i) {
      k_t[at + i * kGradPanel] = from_k[i];
      v_t[at + i * kGradPanel] = from_v[i];
    }
  }
}

void RunSegment(const AttendGradArgs& args, const AttendGradSegment& segment) {
  const int64_t dim = args.head_dim, group = args.num_heads / args.num_kv_heads;
  const int64_t width = (dim + kGradPanel - 1) / kGradPanel * kGradPanel;
  const int64_t num_panels = (segment.num_entries + kGradPanel - 1) / kGradPanel;
  const int64_t num_padded = num_panels * kGradPanel;
  const int64_t key_floats = num_padded * (2 * dim + width), sum_floats = 2 * num_padded * width;
  const std::unique_ptr<float[], FreeDeleter> keys(AllocateFloats(args.num_kv_heads * key_floats));
  const std::unique_ptr<float[], FreeDeleter> sums(AllocateFloats(args.num_heads * sum_floats));
  const auto arrays = [&](int64_t kv_head) {
    float* k_t = keys.get() + kv_head * key_floats;
    return std::array<float*, 3>{k_t, k_t + num_padded * dim, k_t + 2 * num_padded * dim};
  };
  ParallelFor(0, args.num_kv_heads * num_panels, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t kv_head = i / num_panels, entry = i % num_panels * kGradPanel;
      const auto [k_t, v_t, k] = arrays(kv_head);
      PackEntries(args, segment, kv_head, width, entry, entry + kGradPanel, k_t, v_t, k);
    }
  });
  const auto run = DETOUR_DISPATCH(RunGradHead);
  ParallelFor(0, args.num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const auto [k_t, v_t, k] = arrays(head / group);
      float* dk = sums.get() + head * sum_floats;
      std::fill_n(dk, sum_floats, 0.0f);
      run(args, segment, {segment.num_entries, num_panels, width, k_t, v_t, k}, head,
          {dk, dk + num_padded * width});
    }
  });
  // An entry may be listed twice, so not by entries: by kv heads.
  ParallelFor(0, args.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t kv_head = begin; kv_head < end; ++kv_head) {
      for (int64_t e = 0; e < segment.num_entries; ++e) {
        const int64_t to = (segment.Entry(e) * args.num_kv_heads + kv_head) * dim;
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          const float* dk = sums.get() + head * sum_floats + e * width;
          const float* dv = dk + num_padded * width;
          for (int64_t i = 0; i < dim; ++i) args.dk[to + i] += dk[i];
          for (int64_t i = 0; i < dim; ++i) args.dv[to + i] += dv[i];
        }
      }
    }
  });
}

}  // namespace

void AttendBackward(const AttendGradArgs& args, std::span<const AttendGradSegment> segments) {
  DETOUR_CHECK(args.num_kv_heads >= 1 && args.num_heads % args.num_kv_heads == 0 &&
                   args.head_dim >= 1 && args.head_dim <= kMaxHeadDim,
               "{} heads, {} kv heads, head_dim {} of at most {}", args.num_heads,
               args.num_kv_heads, args.head_dim, kMaxHeadDim);
  for (const AttendGradSegment& segment : segments) {
    int64_t rows = 0;
    for (int64_t head = 0; head < args.num_heads; ++head) rows += segment.NumRows(head);
    if (rows > 0 && segment.num_entries > 0) RunSegment(args, segment);
  }
}

}  // namespace detour::kernels
#endif  // HWY_ONCE
