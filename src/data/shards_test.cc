#include "data/shards.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <set>

#include "core/error.h"
#include "core/rng.h"
#include "io/atomic.h"

namespace detour::data {
namespace {

namespace fs = std::filesystem;

class ShardsTest : public ::testing::Test {
 protected:
  ShardsTest()
      : dir_(fs::temp_directory_path() / ("detour_shards_test_" + std::to_string(::getpid()))) {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  ~ShardsTest() override { fs::remove_all(dir_); }

  // Documents of the given lengths (eos included), as the train split.
  void WriteShards(const std::vector<int64_t>& lengths, int32_t vocab_size, int64_t shard_tokens) {
    const Rng rng(7, RngPurpose::kTest);
    ShardWriter writer(dir_, Split::kTrain, vocab_size, shard_tokens);
    ids_.clear();
    begins_.clear();
    for (const int64_t length : lengths) {
      begins_.push_back(ids_.size());
      std::vector<int32_t> document;
      for (int64_t i = 1; i < length; ++i) {
        document.push_back(1 + rng.Below(ids_.size() + i, vocab_size - 1));
      }
      writer.BeginDocument();
      writer.Append(document);  // in two calls, as prepare does
      writer.Append(std::vector<int32_t>{0});
      ids_.insert(ids_.end(), document.begin(), document.end());
      ids_.push_back(0);
    }
    manifest_.vocab_size = vocab_size;
    manifest_.tokenizer_sha256 = "abc";
    manifest_.seed = ~uint64_t{0};
    manifest_.val_fraction = 0.05;
    manifest_.train.shards = writer.Finish();
    manifest_.train.documents = lengths.size();
    manifest_.train.tokens = ids_.size();
    manifest_.train.text_bytes = 123;
    manifest_.sources = {{"a.txt", 123, "def"}};
    WriteManifest(dir_, manifest_);
  }

  TokenShards Open() const { return TokenShards::Open(dir_, Split::kTrain); }

  std::string ErrorOf(const std::function<void()>& fn) const {
    try {
      fn();
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  }
  std::string OpenError() const {
    return ErrorOf([&] { Open(); });
  }

  // Overwrites bytes of a shard.
  void Patch(const std::string& file, int64_t offset, const void* bytes, size_t n) const {
    std::fstream f(dir_ / file, std::ios::in | std::ios::out | std::ios::binary);
    f.seekp(offset);
    f.write(static_cast<const char*>(bytes), n);
  }

  fs::path dir_;
  std::vector<int32_t> ids_;
  std::vector<int64_t> begins_;
  ShardManifest manifest_;
};

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST_F(ShardsTest, EveryReadEqualsTheInput) {
  for (const int32_t vocab_size : {300, 65536, 65537}) {
    for (const int64_t shard_tokens : {1, 3, 7, 64, 1000}) {
      SCOPED_TRACE(fmt::format("vocab {} shard {}", vocab_size, shard_tokens));
      fs::remove_all(dir_);
      fs::create_directories(dir_);
      WriteShards({1, 5, 30, 1, 1, 2, 9, 17}, vocab_size, shard_tokens);
      const TokenShards shards = Open();
      shards.Verify();
      const int64_t n = ids_.size();
      ASSERT_EQ(shards.num_tokens(), n);
      ASSERT_EQ(shards.num_documents(), 8);
      EXPECT_EQ(shards.text_bytes(), 123);
      EXPECT_EQ(shards.vocab_size(), vocab_size);
      EXPECT_EQ(shards.tokenizer_sha256(), "abc");
      EXPECT_EQ(shards.manifest().seed, ~uint64_t{0});
      for (int64_t d = 0; d < 8; ++d) ASSERT_EQ(shards.DocumentBegin(d), begins_[d]);
      EXPECT_EQ(shards.DocumentBegin(8), n);
      for (int64_t first = 0; first < n; ++first) {
        for (int64_t length = 1; first + length <= n; length += 6) {
          std::vector<int32_t> got(length), documents(length), positions(length);
          shards.Read(first, got);
          shards.Locate(first, documents, positions);
          std::vector<int64_t> begins;
          for (int64_t i = 0; i < length; ++i) {
            const int64_t token = first + i;
            ASSERT_EQ(got[i], ids_[token]);
            const int64_t document =
                std::upper_bound(begins_.begin(), begins_.end(), token) - begins_.begin() - 1;
            ASSERT_EQ(shards.DocumentOf(token), document);
            ASSERT_EQ(documents[i], document - shards.DocumentOf(first));
            ASSERT_EQ(positions[i], token - std::max(first, begins_[document]));
            if (begins_[document] == token) begins.push_back(i);
          }
          ASSERT_EQ(shards.DocumentBegins(first, length), begins);
        }
      }
    }
  }
}

TEST_F(ShardsTest, EmptySplitIsAnError) {
  WriteShards({4}, 300, 64);
  EXPECT_HAS(ErrorOf([&] { TokenShards::Open(dir_, Split::kVal); }), "the val split is empty");
}

TEST_F(ShardsTest, CorruptShards) {
  const auto fresh = [&] { WriteShards({20, 30, 14}, 300, 40); };  // 40 + 24 tokens
  fresh();
  EXPECT_EQ(OpenError(), "no error");

  Patch("train-00000.bin", 0, "NOTSHARD", 8);
  EXPECT_HAS(OpenError(), "train-00000.bin: expected magic DTRSHARD, got NOTSHARD");
  fresh();
  const uint32_t two = 2, four = 4, vocab = 301;
  Patch("train-00001.bin", 8, &two, 4);
  EXPECT_HAS(OpenError(), "train-00001.bin: expected version 1, got 2");
  fresh();
  Patch("train-00000.bin", 12, &four, 4);
  EXPECT_HAS(OpenError(), "expected bytes per token 2, got 4");
  fresh();
  const uint64_t many = ~uint64_t{0} / 2;
  Patch("train-00000.bin", 16, &many, 8);
  EXPECT_HAS(OpenError(), "expected number of tokens 40, got 9223372036854775807");
  fresh();
  Patch("train-00000.bin", 24, &many, 8);
  EXPECT_HAS(OpenError(), "expected number of documents 2, got 9223372036854775807");
  fresh();
  Patch("train-00000.bin", 32, &vocab, 4);
  EXPECT_HAS(OpenError(), "expected vocabulary size 300, got 301");

  const int64_t table = 64 + 40 * 2;
  for (const uint64_t begin : {uint64_t{0}, uint64_t{40}, ~uint64_t{0}}) {
    fresh();
    Patch("train-00000.bin", table + 8, &begin, 8);
    EXPECT_HAS(OpenError(), fmt::format("document 1 begins at token {}: expected rising", begin));
  }
  fresh();
  const uint64_t one = 1;
  Patch("train-00000.bin", table, &one, 8);
  EXPECT_HAS(OpenError(), "expected a document at token 0, got none");
  fresh();
  const uint16_t five = 5, high = 300;
  Patch("train-00001.bin", 64 + 23 * 2, &five, 2);
  EXPECT_HAS(OpenError(), "expected the last token to be eos 0, got 5");

  fresh();
  for (const int64_t size : {0, 63, 64, 70, 64 + 80 + 15}) {
    fs::resize_file(dir_ / "train-00000.bin", size);
    EXPECT_HAS(OpenError(), size < 64 ? "expected a header of 64 bytes, the file has"
                                      : "file size in bytes 160, got");
    fresh();
  }
  fs::resize_file(dir_ / "train-00001.bin", 500);
  EXPECT_HAS(OpenError(), "file size in bytes");
  fresh();
  fs::remove(dir_ / "train-00001.bin");
  EXPECT_HAS(OpenError(), "train-00001.bin: the shard is missing");
  fs::create_directory(dir_ / "train-00001.bin");
  EXPECT_HAS(OpenError(), "expected a file, got a directory");
  fs::remove(dir_ / "train-00001.bin");

  fresh();
  Patch("train-00000.bin", 64 + 7 * 2, &high, 2);
  const TokenShards shards = Open();
  std::vector<int32_t> tokens(40);
  EXPECT_HAS(ErrorOf([&] { shards.Read(0, tokens); }), "expected ids below 300, got 300");
  EXPECT_HAS(ErrorOf([&] { shards.Verify(); }), "expected SHA-256");
}

TEST_F(ShardsTest, VerifyFindsADocumentThatDoesNotEnd) {
  WriteShards({20, 30}, 300, 64);
  const uint16_t five = 5;
  Patch("train-00000.bin", 64 + 19 * 2, &five, 2);
  manifest_.train.shards[0].sha256 = "";
  WriteManifest(dir_, manifest_);
  EXPECT_HAS(ErrorOf([&] { Open().Verify(); }), "expected SHA-256 , got ");
  std::string message = ErrorOf([&] { Open().Verify(); });
  manifest_.train.shards[0].sha256 = message.substr(message.size() - 64);
  WriteManifest(dir_, manifest_);
  EXPECT_HAS(ErrorOf([&] { Open().Verify(); }),
             "expected eos 0 before the document at token 20, got 5");
}

TEST_F(ShardsTest, BadManifests) {
  WriteShards({20, 30, 14}, 300, 40);
  const std::string good = io::ReadFile(dir_ / "manifest.json");
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    EXPECT_NE(text.find(from), std::string::npos) << from;
    text.replace(text.find(from), from.size(), to);
    io::WriteFile(dir_ / "manifest.json", text);
    return OpenError();
  };
  EXPECT_EQ(with("{", "{"), "no error");
  EXPECT_EQ(with("\"seed\"", "\"later_key\": [1], \"seed\""), "no error");
  EXPECT_HAS(with("detour-token-shards", "parquet"), "expected format detour-token-shards");
  EXPECT_HAS(with("\"version\": 1", "\"version\": 2"), "expected version 1, got 2");
  EXPECT_HAS(with("u16", "u32"), "expected dtype u16 for 300 ids, got u32");
  EXPECT_HAS(with("\"vocab_size\": 300", "\"vocab_size\": -1"), "vocab_size");
  EXPECT_HAS(with("\"eos_id\": 0", "\"eos_id\": 300"), "eos_id");
  EXPECT_HAS(with("\"seed\": 18446744073709551615", "\"seed\": -1"), "seed is missing or negative");
  EXPECT_HAS(with("train-00001.bin", "../../etc/passwd"), "expected shard train-00001.bin");
  EXPECT_HAS(with("train-00001.bin", "train-00000.bin"), "expected shard train-00001.bin");
  EXPECT_HAS(with("\"tokens\": 64", "\"tokens\": 65"), "expected 65 tokens in 3 documents");
  EXPECT_HAS(with("\"tokens\": 64", "\"tokens\": 9007199254740993"), "tokens");
  EXPECT_HAS(with("\"tokens\": 40", "\"tokens\": 41"), "split train");
  EXPECT_HAS(with("\"documents\": 3", "\"documents\": 2"), "expected 64 tokens in 2 documents");
  EXPECT_HAS(with("\"splits\"", "\"split\""), "splits is missing");
  EXPECT_HAS(with("\"sources\"", "\"source\""), "sources is missing");
  EXPECT_HAS(with(good, ""), "manifest.json");
  EXPECT_HAS(with(good, "[]"), "manifest.json");
  EXPECT_HAS(with(good, good.substr(0, good.size() / 2)), "manifest.json");
  fs::remove(dir_ / "manifest.json");
  EXPECT_HAS(OpenError(), "[data.shards]");
  EXPECT_HAS(OpenError(), "detour prepare");
}

TEST(BatchSampler, EveryEpochVisitsEachSequenceOnce) {
  for (const int64_t n : {1, 2, 3, 4, 5, 10, 63, 64, 65, 1000, 4097}) {
    for (const int64_t seq_len : {1, 7}) {
      const BatchSampler sampler(n * seq_len + 1 + (seq_len - 1), seq_len, 3);
      ASSERT_EQ(sampler.num_sequences(), n);
      std::vector<std::vector<int64_t>> orders;
      for (int64_t epoch = 0; epoch < 3; ++epoch) {
        std::vector<int64_t> order;
        for (int64_t i = 0; i < n; ++i) {
          const int64_t first = sampler.Sequence(epoch * n + i);
          ASSERT_EQ(first % seq_len, 0);
          ASSERT_EQ(sampler.Epoch(epoch * n + i), epoch);
          order.push_back(first / seq_len);
        }
        orders.push_back(order);
        std::sort(order.begin(), order.end());
        for (int64_t i = 0; i < n; ++i) ASSERT_EQ(order[i], i);
      }
      if (n >= 63) {
        EXPECT_NE(orders[0], orders[1]);
        EXPECT_NE(orders[1], orders[2]);
        EXPECT_NE(orders[0][0], BatchSampler(n * seq_len + 1, seq_len, 4).Sequence(0));
      }
    }
  }
}

TEST(BatchSampler, LooksRandom) {
  const int64_t n = 10000;
  const BatchSampler sampler(n + 1, 1, 42);
  std::vector<double> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<double>(sampler.Sequence(i)) / n - 0.5;
  // Correlation with the index and with the neighbour: normal with sigma 1 / sqrt(n) = 0.01.
  double index = 0, neighbour = 0;
  for (int64_t i = 0; i < n; ++i) {
    index += x[i] * (static_cast<double>(i) / n - 0.5);
    neighbour += x[i] * x[(i + 1) % n];
  }
  EXPECT_LT(std::abs(index * 12 / n), 0.04);
  EXPECT_LT(std::abs(neighbour * 12 / n), 0.04);
  // Fixed points of a random permutation: Poisson with mean 1.
  int64_t fixed = 0;
  for (int64_t i = 0; i < n; ++i) fixed += sampler.Sequence(i) == i;
  EXPECT_LE(fixed, 6);
}

TEST(BatchSampler, LargeAndTooSmall) {
  const BatchSampler large(int64_t{1} << 50, 1024, 1);
  for (int64_t i = 0; i < 100; ++i) {
    const int64_t first = large.Sequence((int64_t{1} << 45) + i);
    EXPECT_GE(first, 0);
    EXPECT_LE(first + 1025, int64_t{1} << 50);
  }
  EXPECT_EQ(BatchSampler(1025, 1024, 1).num_sequences(), 1);
  EXPECT_THROW(BatchSampler(1024, 1024, 1), Error);
  EXPECT_THROW(BatchSampler(0, 1024, 1), Error);
}

}  // namespace
}  // namespace detour::data
