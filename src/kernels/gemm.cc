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

#include "kernels/gemm.h"

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

HWY_BEFORE_NAMESPACE();
namespace detour::kernels {
namespace HWY_NAMESPACE {

/// y[r][0, kVectors · kLanes) (+)= x W for kRows rows over n of the inputs. W starts at `w` in its
/// panel; the next panel is panel_size weights further.
template <class Weight, int kRows, int kVectors>
void GemmTile(const float* x, int64_t n, const Weight* w, int64_t panel_size, bool first, float* y,
              int64_t ldy) {
  constexpr int kPanelVectors = static_cast<int>(kPanel) / kLanes;
  constexpr int kPointers = kVectors > kPanelVectors ? kVectors / kPanelVectors : 1;
  const Weight* panels[kPointers];
  for (int i = 0; i < kPointers; ++i) panels[i] = w + i * panel_size;
  Tile<kRows, kVectors> tile;
  tile.Load(y, ldy, first);
  tile.template Accumulate<kXStride, kPointers>(x, n, panels, kPanel, Whole());
  tile.Store(y, ldy);
}

template <class Weight>
using GemmTileFn = decltype(&GemmTile<Weight, 1, 2>);

template <class Weight, bool kWide, int... kRows>
constexpr std::array<GemmTileFn<Weight>, kTileRows> GemmTiles(
    std::integer_sequence<int, kRows...>) {
  return {&GemmTile < Weight, kRows + 1, kWide ? TileVectors(kRows + 1) : 2 > ...};
}
constexpr auto kRowsOfTiles = std::make_integer_sequence<int, kTileRows>();
template <class Weight>
constexpr auto kWideTiles = GemmTiles<Weight, true>(kRowsOfTiles);
template <class Weight>
constexpr auto kNarrowTiles = GemmTiles<Weight, false>(kRowsOfTiles);

/// One row tile (at most kTileRows rows) times the panels [panel, panel_end) of `args`.
template <class Weight>
struct GemmStep {
  const GemmArgs* args;
  int64_t depth_begin, depth;  // the inputs of this step
  bool first, last;

  void Run(const float* x, int64_t row, int64_t rows, int64_t panel, int64_t panel_end) const {
    const PackedMatrix& w = *args->w;
    const auto* weights = reinterpret_cast<const Weight*>(w.data());
    const int64_t panel_size = w.num_inputs() * kPanel;
    const int64_t wide = TileVectors(static_cast<int>(rows)) * kLanes;
    const int64_t end = std::min(panel_end * kPanel, w.num_outputs());
    for (int64_t column = panel * kPanel; column < end;) {
      const int64_t room = (panel_end * kPanel) - column;
      const GemmTileFn<Weight> run =
          wide <= room ? kWideTiles<Weight>[rows - 1] : kNarrowTiles<Weight>[rows - 1];
      const int64_t width = wide <= room ? wide : 2 * kLanes;
      const int64_t used = std::min(width, end - column);
      const Weight* w_at =
          weights + column / kPanel * panel_size + depth_begin * kPanel + column % kPanel;
      float* y = args->y + row * args->ldy + column;
      if (used == width) {
        run(x, depth, w_at, panel_size, first, y, args->ldy);
      } else {
        alignas(64) float whole[kTileRows * 4 * kLanes];
        if (!first) {
          for (int64_t r = 0; r < rows; ++r) {
            std::copy_n(y + r * args->ldy, used, whole + r * width);
          }
        }
        run(x, depth, w_at, panel_size, first, whole, width);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(whole + r * width, used, y + r * args->ldy);
      }
      if (last && args->bias) AddBias(args->bias + column, rows, used, y, args->ldy);
      column += width;
    }
  }
};

/// Inputs [begin, begin + depth) of some rows, to rows of kXStride.
void CopyInputs(const GemmArgs& args, int64_t row, int64_t num_rows, int64_t begin, int64_t depth,
                float* to) {
  if (!args.form.transposed) {
    for (int64_t r = 0; r < num_rows; ++r) {
      std::memcpy(to + r * kXStride, args.x + (row + r) * args.ldx + begin, depth * sizeof(float));
    }
    return;
  }
  // 16 rows at a time: a cache line of each input is read whole.
  for (int64_t r = 0; r < num_rows; r += 16) {
    const int64_t r_end = std::min(r + 16, num_rows);
    for (int64_t k = 0; k < depth; ++k) {
      const float* from = args.x + (begin + k) * args.ldx + row;
      for (int64_t i = r; i < r_end; ++i) to[i * kXStride + k] = from[i];
    }
  }
}

template <class Weight>
void RunBlock(const GemmArgs& args, const GemmBlock& block) {
  const int64_t num_rows = block.row_end - block.row_begin;
  const int64_t num_inputs = args.w->num_inputs();
  const int64_t num_steps = (num_inputs + kMaxDepth - 1) / kMaxDepth;
  const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  float* x = ScratchFloats(num_rows * kXStride);
  for (int64_t s = 0; s < num_steps; ++s) {
    const int64_t begin = num_inputs * s / num_steps, end = num_inputs * (s + 1) / num_steps;
    const GemmStep<Weight> step{&args, begin, end - begin, s == 0 && !args.form.add,
                                s + 1 == num_steps};
    CopyInputs(args, block.row_begin, num_rows, begin, end - begin, x);
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

void RunGemmBlock(const GemmArgs& args, const GemmBlock& block) {
  if (args.w->format() == WeightFormat::kBf16) {
    RunBlock<hwy::bfloat16_t>(args, block);
  } else {
    RunBlock<float>(args, block);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace detour::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace detour::kernels {

void AddBias(const float* bias, int64_t rows, int64_t width, float* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t m = 0; m < width; ++m) y[r * ldy + m] += bias[m];
  }
}

namespace {

int64_t GemmFlops(int64_t num_rows, const PackedMatrix& w) {
  return 2 * num_rows * w.num_outputs() * w.num_inputs();
}

void RunGemm(const GemmArgs& args, int64_t num_rows) {
  const PackedMatrix& w = *args.w;
  DETOUR_CHECK(w.data() && args.ldx >= (args.form.transposed ? num_rows : w.num_inputs()) &&
                   args.ldy >= w.num_outputs(),
               "W [{}, {}], strides {} and {}", w.num_outputs(), w.num_inputs(), args.ldx,
               args.ldy);
  if (num_rows == 0) return;
  const int64_t flops = GemmFlops(num_rows, w);

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
  const auto run = IsQuantized(w.format()) ? QuantGemmBlock() : DETOUR_DISPATCH(RunGemmBlock);
  ParallelFor(0, row_blocks * panel_groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / panel_groups, g = i % panel_groups;
      run(args, {num_rows * b / row_blocks, num_rows * (b + 1) / row_blocks,
                 num_panels * g / panel_groups, num_panels * (g + 1) / panel_groups});
    }
  });
}

}  // namespace

void Gemm(const float* x, int64_t ldx, int64_t num_rows, const PackedMatrix& w, const float* bias,
          float* y, int64_t ldy) {
  RunGemm({x, ldx, &w, bias, y, ldy}, num_rows);
  GlobalOpCounter().gemm_flops.fetch_add(GemmFlops(num_rows, w), std::memory_order_relaxed);
}

void GemmBackward(const float* x, int64_t ldx, int64_t num_rows, const PackedMatrix& w,
                  GemmForm form, float* y, int64_t ldy) {
  DETOUR_CHECK(!IsQuantized(w.format()));
  RunGemm({x, ldx, &w, nullptr, y, ldy, form}, num_rows);
}

}  // namespace detour::kernels
#endif  // HWY_ONCE
