// Against the Python packages tokenizers, sentencepiece and transformers: tests/tokenizer_oracle.py
// writes models, texts and what is expected; here they are compared.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/bpe_trainer.h"
#include "data/tokenizer.h"
#include "io/atomic.h"

namespace detour::data {
namespace {
namespace fs = std::filesystem;

constexpr int64_t kMaxCasesBytes = int64_t{1} << 30;

int RunOracle(const std::string& arguments) {
  const std::string root = DETOUR_SOURCE_DIR;
  // The sanitizers' preloads are not for Python.
  const std::string command = "'" + root + "/.venv/bin/python' '" + root +
                              "/tests/tokenizer_oracle.py' " + arguments + " >&2";
  return std::system(command.c_str());
}

class TokenizerOracle : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (!fs::exists(std::string(DETOUR_SOURCE_DIR) + "/.venv/bin/python")) return;
    std::string name = (fs::temp_directory_path() / "tokenizer_oracle_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = new fs::path(name);
    ASSERT_EQ(RunOracle("make '" + name + "'"), 0);
  }
  static void TearDownTestSuite() {
    if (folder_ != nullptr) fs::remove_all(*folder_);
    delete folder_;
    folder_ = nullptr;
  }
  void SetUp() override {
    if (folder_ == nullptr) {
      GTEST_SKIP() << "no .venv/bin/python: run scripts/setup to compare with the Python packages";
    }
  }

  static std::vector<fs::path> Folders(const char* kind) {
    std::vector<fs::path> folders;
    for (const auto& entry : fs::directory_iterator(*folder_ / kind)) {
      if (entry.is_directory()) folders.push_back(entry.path());
    }
    EXPECT_FALSE(folders.empty());
    return folders;
  }
  static Json ReadJson(const fs::path& path) {
    return ParseJson(io::ReadFile(path.string(), kMaxCasesBytes), path.string());
  }

  static fs::path* folder_;
};

fs::path* TokenizerOracle::folder_ = nullptr;

TEST_F(TokenizerOracle, ByteLevelBpeIdsAreThoseOfTokenizers) {
  for (const fs::path& folder : Folders("bpe")) {
    SCOPED_TRACE(folder.filename());
    const auto tokenizer = Tokenizer::Load(folder.string());
    int num_bad = 0;
    for (const Json& test_case : ReadJson(folder / "cases.json")) {
      const std::string text = test_case[0].get<std::string>();
      const std::vector<int32_t> ids = tokenizer->Encode(text, {});
      const bool equal = ids == test_case[1].get<std::vector<int32_t>>() &&
                         tokenizer->Encode(text, {.add_special_tokens = true}) ==
                             test_case[2].get<std::vector<int32_t>>();
      if (equal) continue;
      ADD_FAILURE() << "text " << test_case[0].dump(-1, ' ', true).substr(0, 1000) << "\nexpected "
                    << test_case[1].dump().substr(0, 1000) << "\ngot      "
                    << Json(ids).dump().substr(0, 1000);
      if (++num_bad == 5) break;
    }
  }
}

TEST_F(TokenizerOracle, TrainerMergesAreThoseOfBpeTrainer) {
  for (const fs::path& folder : Folders("train")) {
    SCOPED_TRACE(folder.filename());
    const Json options = ReadJson(folder / "options.json");
    const BpeSpec expected = ParseTokenizerJson(
        io::ReadFile((folder / "tokenizer.json").string(), kMaxCasesBytes), "expected");
    BpeTrainer trainer(
        {.vocab_size = options["vocab_size"].get<int32_t>(),
         .special_tokens = options["special_tokens"].get<std::vector<std::string>>()});
    for (const auto& entry : fs::directory_iterator(folder)) {
      if (entry.path().extension() != ".txt") continue;
      const std::string text = io::ReadFile(entry.path().string(), kMaxCasesBytes);
      trainer.Feed(text);
      trainer.EndText();
    }
    const BpeSpec spec = trainer.Train();
    EXPECT_TRUE(spec.vocab == expected.vocab);
    EXPECT_TRUE(spec.merges == expected.merges);
  }
}

TEST_F(TokenizerOracle, TokenizersAndTransformersLoadWhatTheTrainerWrites) {
  BpeTrainer trainer({.vocab_size = 1000});
  const Json cases = ReadJson(*folder_ / "bpe" / "bare" / "cases.json");
  for (const Json& test_case : cases) {
    trainer.Feed(test_case[0].get<std::string>());
    trainer.EndText();
  }
  const std::string folder = (*folder_ / "written").string();
  WriteTokenizerDir(trainer.Train(), "<|endoftext|>", folder);
  const auto tokenizer = Tokenizer::Load(folder);
  EXPECT_EQ(tokenizer->bos_id(), 0);
  EXPECT_EQ(tokenizer->eos_id(), 0);
  Json pairs = Json::array();
  for (const Json& test_case : cases) {
    const std::string text = test_case[0].get<std::string>();
    pairs.push_back({text, tokenizer->Encode(text, {})});
    EXPECT_EQ(tokenizer->Decode(pairs.back()[1].get<std::vector<int32_t>>()), text);
  }
  io::WriteFile(folder + "/cases.json", pairs.dump());
  EXPECT_EQ(RunOracle("check '" + folder + "'"), 0);
}

TEST_F(TokenizerOracle, SentencePieceIdsAreThoseOfThePackage) {
  for (const fs::path& folder : Folders("spm")) {
    SCOPED_TRACE(folder.filename());
    const auto tokenizer = Tokenizer::Load(folder.string());
    const bool exact = ReadJson(folder / "info.json")["exact"].get<bool>();
    int num_bad = 0;
    for (const Json& test_case : ReadJson(folder / "cases.json")) {
      const std::string text = test_case[0].get<std::string>();
      const std::vector<int32_t> ids = tokenizer->Encode(text, {});
      const std::string decoded = tokenizer->Decode(ids);
      // A U+2581 of the text comes back as a space.
      const bool same_text = decoded == text || !exact || text.find("\u2581") != std::string::npos;
      const bool equal = ids == test_case[1].get<std::vector<int32_t>>() &&
                         decoded == test_case[2].get<std::string>() && same_text;
      if (equal) continue;
      ADD_FAILURE() << "text " << test_case[0].dump(-1, ' ', true).substr(0, 1000) << "\nexpected "
                    << test_case[1].dump().substr(0, 1000) << "\ngot      "
                    << Json(ids).dump().substr(0, 1000) << "\nexpected "
                    << test_case[2].dump(-1, ' ', true).substr(0, 1000) << "\ngot      "
                    << Printable(decoded, 1000);
      if (++num_bad == 5) break;
    }
    if (!exact) continue;
    for (const std::string& bytes : {std::string("a\xFF b\xC3"), std::string("\x80\xFE"),
                                     std::string(" \xE2\x82 x \xF0\x9F\x98\x80\xF0\x9F")}) {
      EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(bytes, {})), bytes);
    }
  }
}

}  // namespace
}  // namespace detour::data
