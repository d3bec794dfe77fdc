#include "report/child.h"

#include <gtest/gtest.h>

namespace detour::report {
namespace {

TEST(OutputOf, WhatTheProgramPrints) {
  EXPECT_EQ(OutputOf({"/bin/cat"}, "two\nlines\n"), "two\nlines\n");
  const std::string large(1 << 20, 'x');
  EXPECT_EQ(OutputOf({"/bin/cat"}, large), large);
  EXPECT_EQ(OutputOf({"/bin/sh", "-c", "echo $0", "a b"}, ""), "a b\n");
  EXPECT_EQ(OutputOf({"/bin/false"}, ""), std::nullopt);
  EXPECT_EQ(OutputOf({"/no/such/program"}, ""), std::nullopt);
}

}  // namespace
}  // namespace detour::report
