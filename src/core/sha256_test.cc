#include "core/sha256.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "core/error.h"

namespace detour {
namespace {

// Vectors: NIST CSRC, "Secure Hash Standard" example values (SHA256.pdf) and FIPS 180-2 appendix B.
TEST(Sha256, PublishedVectors) {
  EXPECT_EQ(Sha256Hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256Hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Sha256Hex("abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmno"
                      "ijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu"),
            "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
  EXPECT_EQ(Sha256Hex(std::string(1000000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, AnySplitGivesTheSameDigest) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * 7);
  for (size_t length = 0; length <= text.size(); ++length) {
    const std::string_view whole = std::string_view(text).substr(0, length);
    for (size_t step : {size_t{1}, size_t{63}, size_t{64}, size_t{65}, size_t{129}}) {
      Sha256 sha;
      for (size_t i = 0; i < length; i += step) sha.Update(whole.substr(i, step));
      ASSERT_EQ(sha.Hex(), Sha256Hex(whole)) << length << " by " << step;
    }
  }
}

TEST(Sha256, File) {
  const auto path =
      std::filesystem::temp_directory_path() / ("detour_sha256_test_" + std::to_string(::getpid()));
  const std::string text(700001, 'x');
  std::ofstream(path) << text;
  EXPECT_EQ(Sha256File(path), Sha256Hex(text));
  std::filesystem::remove(path);
  EXPECT_THROW(Sha256File(path), Error);
}

}  // namespace
}  // namespace detour
