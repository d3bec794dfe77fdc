#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "kernels/kernels.h"
#include "kernels/test_util.h"

namespace detour::kernels {
namespace {

struct Shape {
  int64_t num_heads, num_kv_heads, head_dim;
};

/// Rows and entries of one call, and the gradients in double, by the formulas.
struct Case {
  Shape s;
  int64_t num_rows, num_written;
  int64_t width = s.num_heads * s.head_dim, kv_width = s.num_kv_heads * s.head_dim;
  float scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  std::vector<float> q = RandomFloats(num_rows * width, 1, 3);
  std::vector<float> k = RandomFloats(num_written * kv_width, 2, 3);
  std::vector<float> v = RandomFloats(num_written * kv_width, 3);
  std::vector<float> dout = RandomFloats(num_rows * width, 4);
  std::vector<float> out = std::vector<float>(num_rows * width);
  std::vector<float> lse = std::vector<float>(num_rows * s.num_heads);
  std::vector<double> dq = std::vector<double>(num_rows * width);
  std::vector<double> dk = std::vector<double>(num_written * kv_width), dv = dk;
  std::vector<AttendGradSegment> segments;
  /// Where the entries that a (row, head) sees are in k and v.
  std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> seen;

  void Add(const AttendGradSegment& segment) {
    segments.push_back(segment);
    for (int64_t h = 0; h < s.num_heads; ++h) {
      for (int64_t i = 0; i < segment.NumRows(h); ++i) Look(segment, i, h);
    }
  }

  void Look(const AttendGradSegment& segment, int64_t i, int64_t h) {
    const RowView view = segment.View(i);
    for (int64_t e = 0; e < view.end; ++e) {
      if (e >= view.kept && e < view.begin) continue;
      seen[{segment.Row(h, i), h}].push_back(segment.Entry(e) * kv_width +
                                             h / (s.num_heads / s.num_kv_heads) * s.head_dim);
    }
  }

  /// The gradients of what was added.
  void Finish() {
    for (const auto& [row_head, at] : seen) AddRow(row_head.first, row_head.second, at);
    seen.clear();
  }

  void AddRow(int64_t row, int64_t h, const std::vector<int64_t>& at) {
    const int64_t dim = s.head_dim, q_at = row * width + h * dim;
    const auto dot = [&](const float* a, const float* b) {
      double sum = 0;
      for (int64_t d = 0; d < dim; ++d) sum += double{a[d]} * b[d];
      return sum;
    };
    std::vector<double> p, o(dim);
    double max = -std::numeric_limits<double>::infinity(), sum = 0, delta = 0;
    for (const int64_t a : at) p.push_back(scale * dot(&q[q_at], &k[a]));
    for (const double x : p) max = std::max(max, x);
    for (double& x : p) sum += x = std::exp(x - max);
    for (size_t j = 0; j < at.size(); ++j) {
      p[j] /= sum;
      for (int64_t d = 0; d < dim; ++d) o[d] += p[j] * v[at[j] + d];
    }
    lse[row * s.num_heads + h] = static_cast<float>(max + std::log(sum));
    for (int64_t d = 0; d < dim; ++d) {
      out[q_at + d] = static_cast<float>(o[d]);
      delta += o[d] * dout[q_at + d];
    }
    for (size_t j = 0; j < at.size(); ++j) {
      const double ds = p[j] * (dot(&dout[q_at], &v[at[j]]) - delta) * scale;
      for (int64_t d = 0; d < dim; ++d) {
        dq[q_at + d] += ds * k[at[j] + d];
        dk[at[j] + d] += ds * q[q_at + d];
        dv[at[j] + d] += p[j] * dout[q_at + d];
      }
    }
  }

  struct Result {
    std::vector<float> dq, dk, dv;
  };
  Result Run() const {
    Result r{std::vector<float>(dq.size()), std::vector<float>(dk.size()),
             std::vector<float>(dv.size())};
    AttendBackward({s.num_heads, s.num_kv_heads, s.head_dim, scale, q.data(), k.data(), v.data(),
                    out.data(), lse.data(), dout.data(), r.dq.data(), r.dk.data(), r.dv.data()},
                   segments);
    return r;
  }

  void ExpectClose() {
    Finish();
    SCOPED_TRACE(::testing::Message() << s.num_heads << " heads, " << s.num_kv_heads
                                      << " kv heads of " << s.head_dim << ", " << num_rows);
    const Result first = Run();
    const auto close = [](const std::vector<float>& got, const std::vector<double>& expected) {
      double norm = 0, difference = 0;
      for (size_t i = 0; i < got.size(); ++i) {
        norm += expected[i] * expected[i];
        difference += (got[i] - expected[i]) * (got[i] - expected[i]);
      }
      EXPECT_GT(norm, 0);
      // Weights carry the error of exp and of a log-sum-exp of some size; sums of it are rounded.
      EXPECT_LE(std::sqrt(difference),
                16 * std::numeric_limits<float>::epsilon() * std::sqrt(norm));
    };
    close(first.dq, dq);
    close(first.dk, dk);
    close(first.dv, dv);
    OnEachTarget([&] {
      const Result r = Run();
      EXPECT_TRUE(SameBits(r.dq, first.dq));
      EXPECT_TRUE(SameBits(r.dk, first.dk));
      EXPECT_TRUE(SameBits(r.dv, first.dv));
    });
  }
};

TEST(AttendBackward, Causal) {
  for (const Shape s : {Shape{1, 1, 16}, {4, 2, 32}, {6, 2, 40}, {2, 1, 65}, {2, 2, 128}}) {
    for (const int64_t rows : {31, 97, 300}) {
      Case c{s, rows, rows};
      c.Add({.num_rows = rows, .num_entries = rows, .first_limit = 1});
      c.ExpectClose();
    }
  }
}

TEST(AttendBackward, SeveralSegments) {
  Case c{{4, 2, 24}, 150, 150};
  c.Add({.num_rows = 40, .num_entries = 40, .first_limit = 1});
  c.Add(
      {.row_begin = 40, .num_rows = 110, .num_entries = 110, .first_entry = 40, .first_limit = 1});
  c.ExpectClose();
}

TEST(AttendBackward, SomeRowsQuery) {
  Case c{{3, 1, 32}, 50, 400};
  std::vector<RowView> views;
  for (int64_t i = 0; i < 50; ++i) views.push_back({0, 0, 8 * i + 3});
  c.Add({.num_rows = 50, .num_entries = 400, .views = views.data()});
  c.ExpectClose();
}

// Entries that stay are listed before all, and once more among them.
TEST(AttendBackward, WindowAndEntriesThatStay) {
  Case c{{4, 2, 32}, 333, 333};
  std::vector<int32_t> entries;
  for (int32_t n = 0; n < 333; n += 7) entries.push_back(n);
  const auto num_staying = std::ssize(entries);
  for (int32_t n = 0; n < 333; ++n) entries.push_back(n);
  std::vector<RowView> views;
  for (int64_t n = 0; n < 333; ++n) {
    const int64_t begin = std::max<int64_t>(0, n - 63);
    const int64_t kept = n % 3 == 0 ? (begin + 6) / 7 : std::min<int64_t>((begin + 6) / 7, 2);
    views.push_back({kept, num_staying + begin, num_staying + n + 1});
  }
  c.Add({.num_rows = 333,
         .num_entries = std::ssize(entries),
         .entries = entries.data(),
         .views = views.data()});
  c.ExpectClose();
}

// Blocks of 32 entries: their own rows see them up to themselves, other rows where a head says so.
TEST(AttendBackward, BlocksThatHeadsChose) {
  constexpr int64_t kBlock = 32;
  Case c{{4, 2, 32}, 300, 300};
  std::vector<std::vector<int32_t>> users(300 / kBlock * 4);
  for (int64_t b = 0; b * kBlock < 300; ++b) {
    const int64_t begin = b * kBlock, n = std::min(kBlock, 300 - begin);
    c.Add({.row_begin = begin,
           .num_rows = n,
           .num_entries = n,
           .first_entry = begin,
           .first_limit = 1});
    if (n < kBlock) break;
    for (int32_t row = begin + kBlock; row < 300; ++row) {
      for (int32_t h = 0; h < 4; ++h) {
        if ((row * 7 + h * 3 + b) % 5 == 0 && h != b % 4) users[b * 4 + h].push_back(row);
      }
    }
    c.Add({.num_entries = n, .first_entry = begin, .rows_of_head = &users[b * 4]});
  }
  c.ExpectClose();
}

// What is not seen may exceed the maximum of what is by far.
TEST(AttendBackward, HiddenEntriesDoNotMatter) {
  Case c{{1, 1, 16}, 40, 40};
  for (int64_t i = 0; i < 16; ++i) c.k[39 * 16 + i] = 1e4f * c.q[i];
  c.Add({.num_rows = 39, .num_entries = 40, .first_limit = 1});
  c.Finish();
  const Case::Result r = c.Run();
  for (int64_t i = 0; i < 39 * 16; ++i)
    EXPECT_TRUE(std::isfinite(r.dq[i]) && std::isfinite(r.dk[i]));
}

}  // namespace
}  // namespace detour::kernels
