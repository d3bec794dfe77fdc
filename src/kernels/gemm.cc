// Matrix products. Nothing here changes an output's order of additions: row blocks, panel groups,
// tiles and threads only choose which outputs are computed when, and a block of the reduction
// stores and reloads the accumulators exactly.
// clang-format off
#include "kernels/simd.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// clang-format on

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/op_counter.h"
#include "core/threads.h"
#include "kernels/kernels.h"
#include "kernels/scratch.h"
#include "kernels/tile-inl.h"

#ifndef DETOUR_KERNELS_GEMM_ONCE
#define DETOUR_KERNELS_GEMM_ONCE
namespace detour::kernels {

inline constexpr int64_t kPanel = 32;  // outputs of a panel

/// The arguments of one Gemm call.
struct GemmArgs {
  const float* x;
  int64_t ldx;
  const PackedMatrix* w;
  const float* bias;
  float* y;
  int64_t ldy;
};

/// A block of the outputs: rows and panels.
struct GemmBlock {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

}  // namespace detour::kernels
#endif  // DETOUR_KERNELS_GEMM_ONCE

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

/// y[r][0, kVectors · kLanes) (+)= x W for kRows rows over n of the inputs. W starts at `w` in its
/// panel; the next panel is panel_floats further.
template <int kRows, int kVectors>
void GemmTile(const float* x, int64_t n, const float* w, int64_t panel_floats, bool first, float* y,
              int64_t ldy) {
  constexpr int kPanelVectors = static_cast<int>(kPanel) / kLanes;
  constexpr int kPointers = kVectors > kPanelVectors ? kVectors / kPanelVectors : 1;
  const float* panels[kPointers];
  for (int i = 0; i < kPointers; ++i) panels[i] = w + i * panel_floats;
  Tile<kRows, kVectors> tile;
  if (first) {
    tile.Clear();
  } else {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) tile.acc[r][v] = hn::LoadU(d, y + r * ldy + v * kLanes);
    }
  }
  tile.template Accumulate<kXStride, kPointers>(x, n, panels, kPanel, Whole());
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) hn::StoreU(tile.acc[r][v], d, y + r * ldy + v * kLanes);
  }
}

using GemmTileFn = void (*)(const float*, int64_t, const float*, int64_t, bool, float*, int64_t);

template <bool kWide, int... kRows>
constexpr std::array<GemmTileFn, kTileRows> GemmTiles(std::integer_sequence<int, kRows...>) {
  return {&GemmTile < kRows + 1, kWide ? TileVectors(kRows + 1) : 2 > ...};
}
constexpr auto kRowsOfTiles = std::make_integer_sequence<int, kTileRows>();
constexpr auto kWideTiles = GemmTiles<true>(kRowsOfTiles);
constexpr auto kNarrowTiles = GemmTiles<false>(kRowsOfTiles);

/// One row tile (at most kTileRows rows) times the panels [panel, panel_end) of `args`.
struct GemmStep {
  const GemmArgs* args;
  int64_t depth_begin, depth;  // the inputs of this step
  bool first, last;

  /// Columns [column, column + width) of rows [row, row + rows), all inside the matrix.
  HWY_INLINE void Store(float* y, int64_t ldy, int64_t rows, int64_t column, int64_t width) const {
    if (!last || !args->bias) return;
    const float* bias = args->bias + column;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t m = 0; m < width; ++m) y[r * ldy + m] += bias[m];
    }
  }

  void Run(const float* x, int64_t row, int64_t rows, int64_t panel, int64_t panel_end) const {
    const PackedMatrix& w = *args->w;
    const int64_t panel_floats = w.num_inputs() * kPanel;
    const int64_t wide = TileVectors(static_cast<int>(rows)) * kLanes;
    const int64_t end = std::min(panel_end * kPanel, w.num_outputs());
    for (int64_t column = panel * kPanel; column < end;) {
      const int64_t room = (panel_end * kPanel) - column;
      const GemmTileFn run = wide <= room ? kWideTiles[rows - 1] : kNarrowTiles[rows - 1];
      const int64_t width = wide <= room ? wide : 2 * kLanes;
      const int64_t used = std::min(width, end - column);
      const float* w_at =
          w.data() + column / kPanel * panel_floats + depth_begin * kPanel + column % kPanel;
      float* y = args->y + row * args->ldy + column;
      if (used == width) {
        run(x, depth, w_at, panel_floats, first, y, args->ldy);
      } else {
        alignas(64) float whole[kTileRows * 4 * kLanes];
        if (!first) {
          for (int64_t r = 0; r < rows; ++r) {
            std::copy_n(y + r * args->ldy, used, whole + r * width);
          }
        }
        run(x, depth, w_at, panel_floats, first, whole, width);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(whole + r * width, used, y + r * args->ldy);
      }
      Store(y, args->ldy, rows, column, used);
      column += width;
    }
  }
};

void RunGemmBlock(const GemmArgs& args, const GemmBlock& block) {
  const int64_t num_rows = block.row_end - block.row_begin;
  const int64_t num_inputs = args.w->num_inputs();
  const int64_t num_steps = (num_inputs + kMaxDepth - 1) / kMaxDepth;
  const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  float* x = ScratchFloats(num_rows * kXStride);
  for (int64_t s = 0; s < num_steps; ++s) {
    const int64_t begin = num_inputs * s / num_steps, end = num_inputs * (s + 1) / num_steps;
    const GemmStep step{&args, begin, end - begin, s == 0, s + 1 == num_steps};
    for (int64_t r = 0; r < num_rows; ++r) {
      std::memcpy(x + r * kXStride, args.x + (block.row_begin + r) * args.ldx + begin,
                  (end - begin) * sizeof(float));
    }
    if (num_tiles == 1) {
      step.Run(x, block.row_begin, num_rows, block.panel_begin, block.panel_end);
      continue;
    }
    // A panel's slice stays in the cache while the row tiles pass over it.
    for (int64_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
      for (int64_t t = 0; t < num_tiles; ++t) {
        const int64_t r = num_rows * t / num_tiles, r_end = num_rows * (t + 1) / num_tiles;
        step.Run(x + r * kXStride, block.row_begin + r, r_end - r, panel, panel + 1);
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace detour::kernels {

void PackedMatrix::Free::operator()(float* p) const { std::free(p); }

int64_t PackedMatrix::bytes() const {
  return (num_outputs_ + kPanel - 1) / kPanel * kPanel * num_inputs_ * sizeof(float);
}

void PackedMatrix::Pack(const float* w, int64_t num_outputs, int64_t num_inputs, int64_t ldw) {
  DETOUR_CHECK(num_outputs >= 1 && num_inputs >= 1 && ldw >= num_inputs, "[{}, {}], stride {}",
               num_outputs, num_inputs, ldw);
  if (!data_ || num_outputs != num_outputs_ || num_inputs != num_inputs_) {
    data_.reset();
    num_outputs_ = num_outputs;
    num_inputs_ = num_inputs;
    data_.reset(AllocateFloats(bytes() / sizeof(float)));
  }
  const int64_t num_panels = (num_outputs + kPanel - 1) / kPanel;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (num_inputs * kPanel));
  ParallelFor(0, num_panels, grain, [&](int64_t panel_begin, int64_t panel_end) {
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const int64_t used = std::min(kPanel, num_outputs - p * kPanel);
      const float* from = w + p * kPanel * ldw;
      float* to = data_.get() + p * kPanel * num_inputs;
      if (used < kPanel) std::fill_n(to, kPanel * num_inputs, 0.0f);
      // 16 columns at a time: a cache line of each row is read whole.
      for (int64_t k = 0; k < num_inputs; k += 16) {
        const int64_t k_end = std::min(k + 16, num_inputs);
        for (int64_t m = 0; m < used; ++m) {
          for (int64_t i = k; i < k_end; ++i) to[i * kPanel + m] = from[m * ldw + i];
        }
      }
    }
  });
}

void Gemm(const float* x, int64_t ldx, int64_t num_rows, const PackedMatrix& w, const float* bias,
          float* y, int64_t ldy) {
  DETOUR_CHECK(w.data() && ldx >= w.num_inputs() && ldy >= w.num_outputs(),
               "W [{}, {}], strides {} and {}", w.num_outputs(), w.num_inputs(), ldx, ldy);
  if (num_rows == 0) return;
  const int64_t flops = 2 * num_rows * w.num_outputs() * w.num_inputs();
  GlobalOpCounter().gemm_flops.fetch_add(flops, std::memory_order_relaxed);

  // A row block's operand fits a 256 KB share of the second-level cache. Enough blocks for the
  // threads: of rows where there are many, else of panels; none so small that waking a thread costs
  // more than it saves.
  constexpr int64_t kBlockRows = 120, kMinBlockFlops = 1 << 18;
  const int64_t num_panels = (w.num_outputs() + kPanel - 1) / kPanel;
  const int64_t row_blocks = (num_rows + kBlockRows - 1) / kBlockRows;
  int64_t panel_groups = 1;
  if (NumThreads() > 1 && row_blocks < 4 * NumThreads()) {
    panel_groups = std::min({num_panels, (4 * NumThreads() + row_blocks - 1) / row_blocks,
                             std::max<int64_t>(1, flops / row_blocks / kMinBlockFlops)});
  }
  const GemmArgs args{x, ldx, &w, bias, y, ldy};
  const auto run = DETOUR_DISPATCH(RunGemmBlock);
  ParallelFor(0, row_blocks * panel_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / panel_groups, g = i % panel_groups;
      run(args, {num_rows * b / row_blocks, num_rows * (b + 1) / row_blocks,
                 num_panels * g / panel_groups, num_panels * (g + 1) / panel_groups});
    }
  });
}

}  // namespace detour::kernels
#endif  // HWY_ONCE
