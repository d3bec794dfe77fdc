// Attention among the blocks of keys that each query head chose.
#include <ATen/ATen.h>

#include <algorithm>

#include "core/error.h"
#include "core/op_counter.h"
#include "core/rng.h"
#include "core/threads.h"
#include "ops/attend.h"
#include "ops/linear.h"

namespace detour::ops {

namespace {

constexpr int64_t kPage = kernels::kPageEntries;

/// Rows whose choices and tables are held at once.
constexpr int64_t kRowsTogether = 256;

struct Chooser {
  const AttendShape& shape;
  const BlockRule& rule;
  float* const* pages;

  /// Scores of blocks [0, own) for one query head. Sums of products of floats in double: any order
  /// of multiply and add in the same sequence gives the same bits.
  void Scores(const float* q_K, int64_t kv_head, int64_t own, double* scores) const {
    const int64_t dim = shape.layout.head_dim, block_pages = shape.layout.block_pages;
    for (int64_t block = 0; block < own; ++block) {
      const float* sums =
          pages[(block + 1) * block_pages - 1] + shape.layout.SumsAt() + kv_head * dim;
      double score = 0;
      for (int64_t i = 0; i < dim; ++i) score += static_cast<double>(q_K[i]) * sums[i];
      scores[block] = score;
    }
  }

  void RandomScores(int32_t position, int64_t head, int64_t own, double* scores) const {
    const Rng rng(rule.seed, RngPurpose::kRoute, static_cast<uint32_t>(position),
                  static_cast<uint32_t>(rule.layer * 1024 + head));
    for (int64_t block = 0; block < own; ++block) scores[block] = rng.Uniform(block);
  }

  /// The blocks that a query head sees, ascending, its own last; the rest of `chosen_T` is −1.
  void Choose(const float* q_K, int64_t head, int64_t own, int32_t position,
              int32_t* chosen_T) const {
    std::fill_n(chosen_T, rule.top, -1);
    if (own < rule.top) {
      for (int64_t block = 0; block <= own; ++block) chosen_T[block] = static_cast<int32_t>(block);
      return;
    }
    thread_local std::vector<double> scores;
    scores.resize(own);
    if (rule.random) {
      RandomScores(position, head, own, scores.data());
    } else {
      Scores(q_K, head / (shape.num_heads / shape.layout.num_kv_heads), own, scores.data());
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
};

/// Attention of rows [begin, end), whose first has entry `entry`; fills their rows of chosen_NHT.
void AttendChunk(const Chooser& chooser, const at::Tensor& q, int64_t begin, int64_t end,
                 int64_t entry, int32_t* chosen_NHT, at::Tensor& out, const at::Tensor& lse) {
  const AttendShape& shape = chooser.shape;
  const auto [size, top] = std::pair(chooser.rule.size, chooser.rule.top);
  const int64_t heads = shape.num_heads, dim = shape.layout.head_dim;
  const int64_t block_pages = shape.layout.block_pages;
  ParallelFor(begin, end, 8, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      for (int64_t h = 0; h < heads; ++h) {
        chooser.Choose(F32(q) + n * q.size(1) + h * dim, h, (entry + n - begin) / size,
                       I32(shape.positions_W)[n], chosen_NHT + (n * heads + h) * top);
      }
    }
  });
  std::vector<kernels::AttendSegment> segments;
  // Rows that see all that is before them need no table of their own.
  const int64_t all = std::clamp<int64_t>(top * size - entry, 0, end - begin);
  if (all > 0) segments.push_back({chooser.pages, begin, all, entry + 1});
  std::vector<const float*> tables((end - begin - all) * heads * top * block_pages);
  const float** table = tables.data();
  for (int64_t n = begin + all; n < end; ++n) {
    const int64_t own = entry + n - begin;
    for (int64_t h = 0; h < heads; ++h) {
      const int32_t* chosen = chosen_NHT + (n * heads + h) * top;
      segments.push_back({table, n, 1, (top - 1) * size + own % size + 1, nullptr, h});
      for (int64_t t = 0; t < top - 1; ++t) {
        table = std::copy_n(chooser.pages + chosen[t] * block_pages, block_pages, table);
      }
      const int64_t first = own / size * block_pages;
      table = std::copy_n(chooser.pages + first, own / kPage - first + 1, table);
    }
  }
  RunAttend(shape, q, segments, out, lse);
}

/// Which entries of its document, which begins at row `begin`, each head of the queries [b, e)
/// chose. Without a store a row's entry is its place in the document.
at::Tensor SeenInBlocks(const at::Tensor& chosen_NHT, const BlockRule& rule, int64_t num_kv_heads,
                        int64_t b, int64_t e, int64_t begin) {
  const at::Tensor chosen = chosen_NHT.slice(0, b, e);  // [m, H, top]
  const at::Tensor entry = at::arange(e - begin, at::kInt).view({1, 1, -1});
  const at::Tensor block = entry.div(rule.size, "floor").to(at::kInt);
  at::Tensor seen = at::zeros({e - b, chosen.size(1), e - begin}, at::kBool);
  for (int64_t t = 0; t < chosen.size(2); ++t) {
    seen.logical_or_(chosen.select(2, t).unsqueeze(2).eq(block));
  }
  seen.logical_and_(entry.le(at::arange(b - begin, e - begin, at::kInt).view({-1, 1, 1})));
  return seen.view({e - b, num_kv_heads, -1, e - begin}).permute({1, 2, 0, 3});
}

}  // namespace

at::Tensor MixBlocks(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttendShape& shape, const BlockRule& rule) {
  DETOUR_CHECK(rule.size == shape.layout.block_pages * kPage && rule.size > 0 && rule.top >= 1);
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
      for (const RoutedSegment& s : segments) {
        for (int64_t b = s.begin; b < s.end; b += kBlockQueries) {
          const int64_t e = std::min(b + kBlockQueries, s.end);
          g.Masked(b, e, s.begin, SeenInBlocks(chosen_NHT, rule, g.num_kv_heads, b, e, s.begin));
        }
      }
    };
  });
}

}  // namespace detour::ops
