#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/rng.h"
#include "kernels/reference.h"
#include "kernels/scratch.h"
#include "kernels/test_util.h"

namespace detour::kernels {
namespace {

/// One sequence in pages of blocks, whose last rows query blocks of their own choice.
struct Case {
  int64_t num_heads, num_kv_heads, head_dim, block_pages, top, num_entries, num_rows;
  KvLayout layout{num_kv_heads, head_dim, false, block_pages};
  int64_t width = num_heads * head_dim, ldq = width + 5, first_entry = num_entries - num_rows;
  int64_t block_size = block_pages * kPageEntries;
  float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  std::vector<float> q = RandomFloats(num_rows * ldq, 1, 3);
  std::vector<std::unique_ptr<float[], FreeDeleter>> owned;
  std::vector<float*> pages;
  std::vector<int32_t> chosen;  // [R, H, top]

  Case(int64_t h, int64_t g, int64_t k, int64_t b, int64_t t, int64_t entries, int64_t rows)
      : num_heads(h),
        num_kv_heads(g),
        head_dim(k),
        block_pages(b),
        top(t),
        num_entries(entries),
        num_rows(rows) {
    const int64_t kv_width = num_kv_heads * head_dim;
    for (int64_t e = 0; e < num_entries; e += kPageEntries) {
      owned.emplace_back(AllocateFloats(layout.PageBytes() / 4));
      pages.push_back(owned.back().get());
      std::fill_n(pages.back(), layout.PageBytes() / 4, std::numeric_limits<float>::quiet_NaN());
    }
    const auto keys = RandomFloats(num_entries * kv_width, 2, 3);
    const auto values = RandomFloats(num_entries * kv_width, 3);
    const std::vector<int32_t> positions(num_entries);
    WriteKvRows(layout, pages.data(), 0, num_entries, keys.data(), kv_width, values.data(),
                kv_width, positions.data());
    const Rng rng(5, RngPurpose::kTest);
    for (int64_t i = 0; i < num_rows * num_heads; ++i) {
      const auto own = static_cast<int32_t>((first_entry + i / num_heads) / block_size);
      std::vector<std::pair<uint64_t, int32_t>> order;
      for (int32_t block = 0; block < own; ++block)
        order.push_back({rng.Bits(i * 100 + block), block});
      std::sort(order.begin(), order.end());
      std::vector<int32_t> mine = {own};
      for (int64_t t = 0; t + 1 < top; ++t) mine.push_back(order[t].second);
      std::sort(mine.begin(), mine.end());
      chosen.insert(chosen.end(), mine.begin(), mine.end());
    }
  }

  /// Each query head's blocks as a table of its own.
  struct Result {
    std::vector<float> out, lse;
  };
  Result Expected() const {
    Result r{std::vector<float>(num_rows * width), std::vector<float>(num_rows * num_heads)};
    for (int64_t i = 0; i < num_rows * num_heads; ++i) {
      std::vector<const float*> table;
      for (int64_t t = 0; t < top; ++t) {
        const int64_t first = chosen[i * top + t] * block_pages;
        const int64_t last = std::min<int64_t>(first + block_pages, std::ssize(pages));
        table.insert(table.end(), pages.begin() + first, pages.begin() + last);
      }
      const int64_t row = i / num_heads;
      const int64_t limit = (top - 1) * block_size + (first_entry + row) % block_size + 1;
      const AttendSegment segment{table.data(), row, 1, limit, nullptr, i % num_heads};
      reference::Attend(layout, num_heads, scale, q.data(), ldq, {&segment, 1}, r.out.data(), width,
                        r.lse.data());
    }
    return r;
  }
  Result Run(int64_t step) const {
    Result r{std::vector<float>(num_rows * width), std::vector<float>(num_rows * num_heads)};
    for (int64_t begin = 0; begin < num_rows; begin += step) {
      AttendBlocks(layout, num_heads, scale, q.data(), ldq,
                   {pages.data(), begin, std::min(step, num_rows - begin), first_entry + begin, top,
                    chosen.data() + begin * num_heads * top},
                   r.out.data(), width, r.lse.data());
    }
    return r;
  }
};

TEST(AttendBlocks, EqualsAttendOverTablesOfTheChosen) {
  for (const Case& c : {Case(4, 2, 32, 1, 3, 100, 40), Case(6, 2, 24, 2, 2, 333, 250),
                        Case(1, 1, 64, 4, 4, 600, 300), Case(2, 2, 40, 1, 1, 50, 34)}) {
    const Case::Result expected = c.Expected();
    OnEachTarget([&] {
      for (const int64_t step : {int64_t{1}, int64_t{7}, c.num_rows}) {
        const Case::Result r = c.Run(step);
        EXPECT_TRUE(SameBits(r.out, expected.out));
        EXPECT_TRUE(SameBits(r.lse, expected.lse));
      }
    });
  }
}

TEST(ScoreBlocks, AreProductsWithSumsInOrder) {
  const Case c(4, 2, 24, 1, 2, 400, 30);
  const int64_t num_blocks = 19;
  std::vector<float> expected;
  for (int64_t h = 0; h < c.num_heads; ++h) {
    for (int64_t r = 0; r < c.num_rows; ++r) {
      for (int64_t b = 0; b < num_blocks; ++b) {
        const float* sums = c.pages[b] + c.layout.SumsAt() + h / 2 * c.head_dim;
        float score = 0;
        for (int64_t d = 0; d < c.head_dim; ++d) {
          score = std::fma(c.q[r * c.ldq + h * c.head_dim + d], sums[d], score);
        }
        expected.push_back(score);
      }
    }
  }
  OnEachTarget([&] {
    std::vector<float> scores(expected.size());
    ScoreBlocks(c.layout, c.num_heads, c.q.data(), c.ldq, c.num_rows, c.pages.data(), num_blocks,
                scores.data());
    EXPECT_TRUE(SameBits(scores, expected));
  });
}

}  // namespace
}  // namespace detour::kernels
