#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "core/op_counter.h"
#include "kernels/reference.h"
#include "kernels/scratch.h"
#include "kernels/test_util.h"

namespace detour::kernels {
namespace {

constexpr float kEps = std::numeric_limits<float>::epsilon();

/// A sequence's pages, NaN wherever nothing was written.
struct PageTable {
  KvLayout layout;
  std::vector<std::unique_ptr<float[], FreeDeleter>> owned;
  std::vector<float*> pages;

  PageTable(const KvLayout& l, int64_t num_entries) : layout(l) {
    for (int64_t e = 0; e < num_entries; e += kPageEntries) {
      const int64_t floats = layout.PageBytes() / 4;
      owned.emplace_back(AllocateFloats(floats));
      pages.push_back(owned.back().get());
      std::fill_n(pages.back(), floats, std::numeric_limits<float>::quiet_NaN());
    }
  }
};

struct Heads {
  int64_t num_heads, num_kv_heads, head_dim;
};

/// Several sequences: keys and values of each in its own pages, queries in common rows.
struct Case {
  Heads heads;
  KvLayout layout{heads.num_kv_heads, heads.head_dim, true};
  int64_t width = heads.num_heads * heads.head_dim, ld = width + 3, num_rows = 0;
  float scale = 1.0f / std::sqrt(static_cast<float>(heads.head_dim));
  std::vector<PageTable> tables;
  std::vector<std::vector<float>> keys, values;
  std::vector<AttendSegment> segments;
  std::vector<float> q;

  explicit Case(Heads h) : heads(h) {}

  /// A sequence of `num_entries`, whose last `rows` are queried.
  void Add(int64_t num_entries, int64_t rows) {
    const int64_t kv_width = heads.num_kv_heads * heads.head_dim, seed = 10 * tables.size();
    tables.emplace_back(layout, num_entries);
    keys.push_back(RandomFloats(num_entries * kv_width, seed + 1, 3));
    values.push_back(RandomFloats(num_entries * kv_width, seed + 2));
    std::vector<int32_t> positions(num_entries);
    for (int64_t e = 0; e < num_entries; ++e) positions[e] = static_cast<int32_t>(3 * e);
    WriteKvRows(layout, tables.back().pages.data(), 0, num_entries, keys.back().data(), kv_width,
                values.back().data(), kv_width, positions.data());
    segments.push_back({tables.back().pages.data(), num_rows, rows, num_entries - rows + 1});
    num_rows += rows;
    q = RandomFloats(num_rows * ld, 99, 3);
  }

  struct Result {
    std::vector<float> out, lse;
  };
  Result Run(bool use_reference = false) const { return Run(segments, use_reference); }
  Result Run(std::span<const AttendSegment> parts, bool use_reference = false) const {
    Result r{std::vector<float>(num_rows * ld, -7.0f),
             std::vector<float>(num_rows * heads.num_heads, -7.0f)};
    const auto attend = use_reference ? reference::Attend : Attend;
    attend(layout, heads.num_heads, scale, q.data(), ld, parts, r.out.data(), ld, r.lse.data());
    return r;
  }

  void ExpectExact() const {
    SCOPED_TRACE(::testing::Message() << heads.num_heads << " heads, " << heads.num_kv_heads
                                      << " kv heads of " << heads.head_dim);
    const Result expected = Run(true);
    OnEachTarget([&] {
      const Result got = Run();
      EXPECT_TRUE(SameBits(got.out, expected.out));
      EXPECT_TRUE(SameBits(got.lse, expected.lse));
    });
  }
};

TEST(Attend, EqualsReferenceForEveryHeadShape) {
  for (const int64_t head_dim : {1, 20, 32, 40, 64, 72, 96, 128}) {
    for (const int64_t group : {1, 2, 3, 4, 15}) {
      Case c({2 * group, 2, head_dim});
      c.Add(45, 30);
      c.ExpectExact();
    }
  }
}

TEST(Attend, EqualsReferenceForEveryLength) {
  for (int64_t keys = 1; keys <= 200; ++keys) {
    Case c({3, 1, 20});
    c.Add(keys, std::min<int64_t>(keys, 1 + keys % 7));
    c.ExpectExact();
  }
}

TEST(Attend, SeveralSegments) {
  Case c({6, 2, 32});
  c.Add(1, 1);
  c.Add(100, 100);
  c.Add(37, 1);
  c.Add(64, 0);
  c.Add(150, 13);
  c.ExpectExact();
}

TEST(Attend, SeveralChunksOfPages) {
  for (const int64_t entries : {255, 256, 257, 600}) {
    Case c({6, 2, 20});
    c.Add(entries, 40);
    c.ExpectExact();
  }
}

/// Rows that see [0, kept) and [begin, end): windows that move on, prefixes that grow.
TEST(Attend, ViewsEqualReference) {
  for (const int64_t head_dim : {20, 64}) {
    for (const int64_t stride : {1, 9}) {
      Case c({6, 2, head_dim});
      c.Add(330, 33);
      std::vector<RowView> views;
      for (int64_t i = 0; i < 33; ++i) {
        const int64_t end = 20 + i * stride, begin = std::max<int64_t>(end - 17, 0);
        views.push_back({std::min<int64_t>(i / 2, begin), begin, end});
      }
      views[4] = {0, 0, 1};    // its own key alone
      views[5] = {3, 3, 3};    // a prefix alone
      views[6] = {2, 40, 41};  // a hole of more than a page
      c.segments[0].views = views.data();
      c.ExpectExact();
      // Which rows share a call changes nothing.
      const Case::Result all = c.Run();
      std::vector<AttendSegment> rows;
      for (int64_t i = 0; i < 33; ++i)
        rows.push_back({c.tables[0].pages.data(), i, 1, 0, &views[i]});
      EXPECT_TRUE(SameBits(c.Run(rows).out, all.out));
      GlobalOpCounter().Reset();
      c.Run();
      int64_t visited = 0;
      for (const RowView& v : views) visited += v.kept + v.end - v.begin;
      EXPECT_EQ(GlobalOpCounter().visited_keys, visited);
    }
  }
}

TEST(Attend, AHoleWithoutEntriesChangesNoBit) {
  Case c({4, 2, 32});
  c.Add(100, 20);
  const Case::Result whole = c.Run();
  // The same entries by a table that has the page of entry 40 twice, and a hole between.
  std::vector<float*> pages = c.tables[0].pages;
  pages.insert(pages.begin() + 2, pages[2]);
  std::vector<RowView> views;
  for (int64_t i = 0; i < 20; ++i) views.push_back({40, 56, 97 + i});
  const AttendSegment twice{pages.data(), 0, 20, 0, views.data()};
  const Case::Result got = c.Run({&twice, 1});
  EXPECT_TRUE(SameBits(got.out, whole.out));
  EXPECT_TRUE(SameBits(got.lse, whole.lse));
}

TEST(Attend, OneHeadAtATimeEqualsAllInOneCall) {
  Case c({6, 2, 20});
  c.Add(90, 25);
  const Case::Result all = c.Run();
  std::vector<AttendSegment> heads;
  for (int64_t h = 0; h < 6; ++h) {
    heads.push_back(c.segments[0]);
    heads.back().head = h;
  }
  GlobalOpCounter().Reset();
  EXPECT_TRUE(SameBits(c.Run(heads).out, all.out));
  EXPECT_TRUE(SameBits(c.Run(heads, true).out, all.out));
  EXPECT_EQ(GlobalOpCounter().visited_keys, 25 * (66 + 90) / 2);
}

TEST(Attend, OneRowAtATimeEqualsAllInOneCall) {
  Case c({8, 4, 64});
  c.Add(120, 120);
  c.Add(33, 5);
  OnEachTarget([&] {
    const Case::Result all = c.Run();
    std::vector<AttendSegment> rows;
    for (const AttendSegment& s : c.segments) {
      for (int64_t i = 0; i < s.num_rows; ++i) {
        rows.push_back({s.pages, s.row_begin + i, 1, s.first_limit + i});
      }
    }
    EXPECT_TRUE(SameBits(c.Run(rows).out, all.out));
    std::vector<float> parts(all.out.size(), -7.0f);
    for (const AttendSegment& row : rows) {
      Attend(c.layout, 8, c.scale, c.q.data(), c.ld, {&row, 1}, parts.data(), c.ld, nullptr);
    }
    EXPECT_TRUE(SameBits(parts, all.out));
  });
}

TEST(Attend, ErrorWithinBound) {
  Case c({4, 2, 64});
  c.Add(300, 8);
  const Case::Result got = c.Run();
  for (int64_t r = 0; r < 8; ++r) {
    for (int64_t h = 0; h < 4; ++h) {
      const int64_t limit = 293 + r, g = h / 2;
      std::vector<double> p(limit), exact(64);
      double max = -1e30, sum = 0, largest = 0;
      for (int64_t j = 0; j < limit; ++j) {
        double score = 0, magnitude = 0;
        for (int64_t i = 0; i < 64; ++i) {
          const double term =
              double{c.q[r * c.ld + h * 64 + i]} * c.keys[0][j * 128 + g * 64 + i] * c.scale;
          score += term;
          magnitude += std::abs(term);
        }
        p[j] = score;
        max = std::max(max, score);
        largest = std::max(largest, magnitude);
      }
      for (double& s : p) sum += s = std::exp(s - max);
      for (int64_t j = 0; j < limit; ++j) {
        for (int64_t i = 0; i < 64; ++i) exact[i] += p[j] / sum * c.values[0][j * 128 + g * 64 + i];
      }
      // |values| <= 1. A score errs by at most (K/2 + 2) eps of its magnitude, which exp makes a
      // relative error of p, in numerator and denominator; the sums add limit · eps.
      const double bound = 2 * kEps * (largest * (64 / 2 + 2) + limit);
      for (int64_t i = 0; i < 64; ++i) {
        EXPECT_NEAR(got.out[r * c.ld + h * 64 + i], exact[i], bound);
      }
      EXPECT_NEAR(got.lse[r * 4 + h], max + std::log(sum), bound);
    }
  }
}

TEST(Attend, CountsOperations) {
  Case c({6, 2, 32});
  c.Add(10, 4);  // 7 + 8 + 9 + 10 keys
  c.Add(3, 3);   // 1 + 2 + 3
  GlobalOpCounter().Reset();
  c.Run();
  EXPECT_EQ(GlobalOpCounter().visited_keys, 40);
  EXPECT_EQ(GlobalOpCounter().attention_flops, 4 * 32 * 6 * 40);
}

TEST(Attend, ChecksItsArguments) {
  Case c({4, 2, 8});
  c.Add(4, 4);
  EXPECT_THROW(Attend(c.layout, 3, 1, c.q.data(), c.ld, c.segments, nullptr, c.ld, nullptr),
               std::logic_error);
  const AttendSegment blind{c.segments[0].pages, 0, 1, 0};
  EXPECT_THROW(Attend(c.layout, 4, 1, c.q.data(), c.ld, {&blind, 1}, nullptr, c.ld, nullptr),
               std::logic_error);
}

TEST(WriteKv, FullPagesEndWithTheSumsOfTheirBlock) {
  const KvLayout layout{2, 5, true, /*block_pages=*/2};
  const std::vector<float> k = RandomFloats(70 * 10, 1), v = RandomFloats(70 * 10, 2);
  const std::vector<int32_t> positions(70);
  PageTable table(layout, 70);
  for (const auto& [begin, end] : {std::pair{0, 13}, {13, 16}, {16, 65}, {65, 70}}) {
    WriteKvRows(layout, table.pages.data(), begin, end - begin, k.data() + begin * 10, 10,
                v.data() + begin * 10, 10, positions.data() + begin);
  }
  for (int64_t page = 0; page < 4; ++page) {
    for (int64_t i = 0; i < 10; ++i) {
      float sum = 0;
      for (int64_t e = page / 2 * 32; e < (page + 1) * 16; ++e) sum += k[e * 10 + i];
      EXPECT_EQ(table.pages[page][layout.SumsAt() + i], sum) << page;
    }
  }
  EXPECT_TRUE(std::isnan(table.pages[4][layout.SumsAt()]));
}

TEST(WriteKv, RowsEqualEntries) {
  const KvLayout layout{3, 5, true};
  const int64_t ldk = 17, ldv = 19, first = 11, rows = 40;
  const std::vector<float> k = RandomFloats(rows * ldk, 1), v = RandomFloats(rows * ldv, 2);
  std::vector<int32_t> positions(rows);
  for (int64_t r = 0; r < rows; ++r) positions[r] = static_cast<int32_t>(100 + 3 * r);
  PageTable at_once(layout, first + rows), one_by_one(layout, first + rows);
  WriteKvRows(layout, at_once.pages.data(), first, rows, k.data(), ldk, v.data(), ldv,
              positions.data());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t entry = first + r;
    WriteKv(layout, one_by_one.pages[entry / 16], entry % 16, k.data() + r * ldk,
            v.data() + r * ldv, positions[r]);
    const float* page = at_once.pages[entry / 16];
    for (int64_t g = 0; g < 3; ++g) {
      for (int64_t i = 0; i < 5; ++i) {
        EXPECT_EQ(page[(g * 5 + i) * 16 + entry % 16], k[r * ldk + g * 5 + i]);
        EXPECT_EQ(page[240 + (g * 16 + entry % 16) * 5 + i], v[r * ldv + g * 5 + i]);
      }
    }
    int32_t position;
    std::memcpy(&position, page + 480 + entry % 16, 4);
    EXPECT_EQ(position, positions[r]);
  }
  for (size_t p = 0; p < at_once.pages.size(); ++p) {
    EXPECT_EQ(std::memcmp(at_once.pages[p], one_by_one.pages[p], layout.PageBytes()), 0);
  }
}

}  // namespace
}  // namespace detour::kernels
