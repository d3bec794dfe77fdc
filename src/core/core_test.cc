#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "core/error.h"
#include "core/rng.h"
#include "core/threads.h"

namespace detour {
namespace {

TEST(Philox, MatchesPublishedVectors) {
  // Random123's kat_vectors, philox4x32 10 rounds.
  EXPECT_EQ(Philox({0, 0, 0, 0}, {0, 0}),
            (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Rng, MomentsAndRange) {
  const Rng rng(7, RngPurpose::kTest);
  double sum = 0, squares = 0;
  constexpr int kN = 100000;
  for (int i = 0; i < kN; ++i) {
    const double z = rng.Normal(i);
    sum += z;
    squares += z * z;
    ASSERT_LT(rng.Below(i, 10), 10u);
    ASSERT_LT(rng.Uniform(i), 1.0);
  }
  EXPECT_NEAR(sum / kN, 0.0, 4 / std::sqrt(kN));
  EXPECT_NEAR(squares / kN, 1.0, 4 * std::sqrt(2.0 / kN));
}

TEST(ParallelFor, CoversOnceAndRethrows) {
  for (int threads : {1, 2, 5}) {
    SetNumThreads(threads);
    std::vector<std::atomic<int>> hits(1000);
    ParallelFor(0, 1000, 7, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) ++hits[i];
      ParallelFor(0, 4, 1, [](int64_t, int64_t) {});  // nested: must not deadlock
    });
    for (const auto& h : hits) EXPECT_EQ(h, 1);
    EXPECT_THROW(ParallelFor(0, 100, 1, [](int64_t, int64_t) { throw Error("test", "x"); }), Error);
  }
}

TEST(Error, SaysCodeAndMessage) {
  try {
    Fail("io.test", "expected {}, got {}", 1, 2);
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "[io.test] expected 1, got 2");
    EXPECT_EQ(e.code(), "io.test");
  }
  EXPECT_THROW(DETOUR_CHECK(1 == 2, "value {}", 3), std::logic_error);
}

}  // namespace
}  // namespace detour
