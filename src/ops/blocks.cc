// Attention among the blocks of keys that each query head chose.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "core/op_counter.h"
#include "core/rng.h"
#include "core/threads.h"
#include "ops/attend.h"
#include "ops/linear.h"

namespace detour::ops {

namespace {

/// Rows whose choices and tables are held at once.
constexpr int64_t kRowsTogether = 256;

struct Chooser {
  const AttendShape& shape;
  const BlockRule& rule;
  float* const* pages;

  void RandomScores(int32_t position, int64_t head, int64_t own, float* scores) const {
    const Rng rng(rule.seed, RngPurpose::kRoute, static_cast<uint32_t>(position),
                  static_cast<uint32_t>(rule.layer * 1024 + head));
    for (int64_t block = 0; block < own; ++block) {
      scores[block] = static_cast<float>(rng.Uniform(block));
    }
  }

  /// The blocks that a query head sees of those before its own, by `scores`; ascending, its own
  /// last. If there are fewer than `top` the rest of `chosen_T` is −1.
  void Choose(const float* scores, int64_t own, int32_t* chosen_T) const {
    std::fill_n(chosen_T, rule.top, -1);
    if (own < rule.top) {
      for (int64_t block = 0; block <= own; ++block) chosen_T[block] = static_cast<int32_t>(block);
      return;
    }
    thread_local std::vector<int32_t> order;
    order.resize(own);
    for (int64_t block = 0; block < own; ++block) order[block] = static_cast<int32_t>(block);
    std::nth_element(order.begin(), order.begin() + (rule.top - 1), order.end(),
                     [&](int32_t a, int32_t b) {
                       return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
                     });
    std::sort(order.begin(), order.begin() + (rule.top - 1));
    std::copy_n(order.begin(), rule.top - 1, chosen_T);
    chosen_T[rule.top - 1] = static_cast<int32_t>(own);
  }

  /// The choices of rows [begin, end), whose first has entry `entry`.
  void ChooseRows(const at::Tensor& q, int64_t begin, int64_t end, int64_t entry,
                  int32_t* chosen_NHT) const {
    const int64_t heads = shape.num_heads, rows = end - begin;
    const int64_t num_blocks = (entry + rows - 1) / rule.size;  // before the last row's own
    at::Tensor scores = at::empty({heads * rows * num_blocks}, at::kFloat);
    float* score = scores.data_ptr<float>();
    if (!rule.random && num_blocks > 0) {
      kernels::ScoreBlocks(shape.layout, heads, F32(q) + begin * q.size(1), q.size(1), rows, pages,
                           num_blocks, score);
    }
    ParallelFor(0, rows, 8, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) {
        const int64_t own = (entry + r) / rule.size, n = begin + r;
        for (int64_t h = 0; h < heads; ++h) {
          float* of_row = score + (h * rows + r) * num_blocks;
          if (rule.random) RandomScores(I32(shape.positions_W)[n], h, own, of_row);
          Choose(of_row, own, chosen_NHT + (n * heads + h) * rule.top);
        }
      }
    });
  }
};

/// Attention of rows [begin, end), whose first has entry `entry`; fills their rows of chosen_NHT.
void AttendChunk(const Chooser& chooser, const at::Tensor& q, int64_t begin, int64_t end,
                 int64_t entry, int32_t* chosen_NHT, at::Tensor& out, const at::Tensor& lse) {
  const AttendShape& shape = chooser.shape;
  const int64_t size = chooser.rule.size, top = chooser.rule.top;
  chooser.ChooseRows(q, begin, end, entry, chosen_NHT);
  // Rows that see all that is before them.
  const int64_t all = std::clamp<int64_t>(top * size - entry, 0, end - begin);
  if (all > 0) RunAttend(shape, q, {{chooser.pages, begin, all, entry + 1}}, out, lse);
  if (all == end - begin) return;
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.layout.head_dim));
  kernels::AttendBlocks(shape.layout, shape.num_heads, scale, F32(q), q.size(1),
                        {chooser.pages, begin + all, end - begin - all, entry + all, top,
                         chosen_NHT + (begin + all) * shape.num_heads * top},
                        F32(out), out.size(1), lse.defined() ? F32(lse) : nullptr);
}

/// Gradients of one document's rows: those of a block see it up to themselves, and those that chose
/// it later see all of it. Without a store a row's entry is its place in the document.
void AddGradients(const at::Tensor& chosen_NHT, const BlockRule& rule, const RoutedSegment& s,
                  AttentionGradients& g) {
  const int64_t heads = chosen_NHT.size(1), num_rows = s.end - s.begin;
  const int64_t num_blocks = (num_rows + rule.size - 1) / rule.size;
  std::vector<std::vector<int32_t>> users(num_blocks * heads);  // [block][head]
  const int32_t* chosen = I32(chosen_NHT) + s.begin * heads * rule.top;
  for (int64_t i = 0; i < num_rows * heads * rule.top; ++i) {
    const int64_t row = i / (heads * rule.top), head = i / rule.top % heads;
    if (chosen[i] < 0 || chosen[i] == row / rule.size) continue;
    users[chosen[i] * heads + head].push_back(static_cast<int32_t>(s.begin + row));
  }
  std::vector<kernels::AttendGradSegment> segments;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const int64_t begin = s.begin + b * rule.size, n = std::min(rule.size, s.end - begin);
    segments.push_back({.row_begin = begin,
                        .num_rows = n,
                        .num_entries = n,
                        .first_entry = begin,
                        .first_limit = 1});
    segments.push_back({.num_entries = n, .first_entry = begin, .rows_of_head = &users[b * heads]});
  }
  g.Add(segments);
}

}  // namespace

at::Tensor MixBlocks(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttendShape& shape, const BlockRule& rule) {
  DETOUR_CHECK(rule.size == shape.layout.block_pages * kernels::kPageEntries && rule.size > 0 &&
               rule.top >= 1);
  return MixRows(q, k, v, shape, [&](at::Tensor& out, const at::Tensor& lse) -> BackwardFn {
    CallPages call(shape.layout);
    const at::Tensor chosen_NHT = at::empty({q.size(0), shape.num_heads, rule.top}, at::kInt);
    int64_t scored = 0;
    for (const RoutedSegment& s : shape.segments) {
      const auto [pages, first_entry] =
          WriteSegment(shape, s, k, v, shape.store ? *shape.store : call);
      const Chooser chooser{shape, rule, pages};
      for (int64_t b = s.begin; b < s.end; b += kRowsTogether) {
        AttendChunk(chooser, q, b, std::min(b + kRowsTogether, s.end), first_entry + b - s.begin,
                    chosen_NHT.data_ptr<int32_t>(), out, lse);
      }
      for (int64_t e = first_entry; e < first_entry + s.end - s.begin; ++e) {
        if (e / rule.size >= rule.top) scored += e / rule.size;
      }
    }
    if (!rule.random) {
      GlobalOpCounter().attention_flops.fetch_add(
          2 * scored * shape.num_heads * shape.layout.head_dim, std::memory_order_relaxed);
    }
    return [=, segments = shape.segments](AttentionGradients& g) {
      for (const RoutedSegment& s : segments) AddGradients(chosen_NHT, rule, s, g);
    };
  });
}

}  // namespace detour::ops
