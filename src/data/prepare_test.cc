#include "data/prepare.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <utility>

#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"
#include "core/sha256.h"
#include "core/threads.h"
#include "data/test_encoder.h"
#include "io/atomic.h"

namespace detour::data {
namespace {

namespace fs = std::filesystem;

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

class PrepareTest : public ::testing::Test {
 protected:
  PrepareTest()
      : dir_(fs::temp_directory_path() / ("detour_prepare_test_" + std::to_string(::getpid()))) {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    options_.out_dir = dir_ / "out";
    options_.overwrite = true;
    options_.note = [this](const std::string& note) { notes_ += note + "\n"; };
    encoder_ = {RegexEncoder(kGpt2Regex), kRegexVocabSize, 0, "hash"};
  }
  ~PrepareTest() override { fs::remove_all(dir_); }

  std::string File(const std::string& name, const std::string& text) const {
    fs::create_directories((dir_ / name).parent_path());
    std::ofstream(dir_ / name, std::ios::binary) << text;
    return dir_ / name;
  }

  std::string ErrorOf(const std::vector<std::string>& inputs) {
    options_.inputs = inputs;
    try {
      Prepare(options_, encoder_);
    } catch (const Error& e) {
      // Nothing of a failed run stays, whatever it had written.
      for (const auto& entry : fs::directory_iterator(dir_)) {
        EXPECT_EQ(entry.path().string().find("tmp-"), std::string::npos) << entry.path();
      }
      return e.what();
    }
    return "no error";
  }

  // Documents of a split as ids, each without its eos.
  std::vector<std::vector<int32_t>> Documents(Split split) const {
    if (ReadManifest(options_.out_dir).split(split).documents == 0) return {};
    const TokenShards shards = TokenShards::Open(options_.out_dir, split);
    shards.Verify();
    std::vector<std::vector<int32_t>> documents;
    for (int64_t d = 0; d < shards.num_documents(); ++d) {
      std::vector<int32_t> ids(shards.DocumentBegin(d + 1) - shards.DocumentBegin(d));
      shards.Read(shards.DocumentBegin(d), ids);
      EXPECT_EQ(ids.back(), 0);
      ids.pop_back();
      documents.push_back(ids);
    }
    return documents;
  }

  // Prepares without a validation split and expects exactly these documents.
  void ExpectDocuments(const std::vector<std::string>& inputs,
                       const std::vector<std::string>& texts) {
    options_.inputs = inputs;
    options_.val_fraction = 0;
    const ShardManifest manifest = Prepare(options_, encoder_);
    const auto documents = Documents(Split::kTrain);
    ASSERT_EQ(documents.size(), texts.size());
    int64_t bytes = 0;
    for (size_t i = 0; i < texts.size(); ++i) {
      ASSERT_EQ(documents[i], encoder_.encode(texts[i])) << "document " << i;
      bytes += texts[i].size();
    }
    EXPECT_EQ(manifest.train.text_bytes, bytes);
    EXPECT_EQ(manifest.val.documents, 0);
    EXPECT_TRUE(manifest.val.shards.empty());
  }

  std::map<std::string, std::string> OutFiles() const {
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::directory_iterator(options_.out_dir)) {
      files[entry.path().filename()] = io::ReadFile(entry.path());
    }
    return files;
  }

  static std::string Words(uint64_t seed, size_t bytes) {
    static const std::vector<std::string> kWords = {"the ",   "state ",  "of ", "union, ",
                                                    "1790. ", "it's ",   "\n",  "\n\n",
                                                    "We ",    "people ", "été "};
    const Rng rng(seed, RngPurpose::kTest);
    std::string text;
    for (uint64_t i = 0; text.size() < bytes; ++i) text += kWords[rng.Below(i, kWords.size())];
    return text;
  }

  fs::path dir_;
  PrepareOptions options_;
  TextEncoder encoder_;
  std::string notes_;
};

TEST_F(PrepareTest, AFileIsADocument) {
  const std::string a = File("a.txt", "First one.\n"), b = File("b", "Second \xff"),
                    empty = File("e.txt", "");
  ExpectDocuments({a, empty, b}, {"First one.\n", "Second \xff"});
  const ShardManifest manifest = ReadManifest(options_.out_dir);
  ASSERT_EQ(manifest.sources.size(), 3);
  EXPECT_EQ(manifest.sources[0].name, a);
  EXPECT_EQ(manifest.sources[0].bytes, 11);
  EXPECT_EQ(manifest.sources[0].sha256, Sha256Hex("First one.\n"));
  EXPECT_EQ(manifest.sources[1].sha256, Sha256Hex(""));
  EXPECT_EQ(manifest.tokenizer_sha256, "hash");
}

TEST_F(PrepareTest, LiteralSeparator) {
  options_.documents.separator = "<|end|>\\n";
  ExpectDocuments({File("a.txt", "one<|end|>\ntwo\n<|end|>\n<|end|>\nthree<|end|>")},
                  {"one", "two\n", "three<|end|>"});
  // Across the 1 MiB blocks of the reader, at every offset.
  for (int shift = 0; shift < 10; ++shift) {
    const std::string first = Words(1, (1 << 20)).substr(0, (1 << 20) - shift);
    ExpectDocuments({File("a.txt", first + "<|end|>\nrest")}, {first, "rest"});
  }
}

TEST_F(PrepareTest, LineSeparators) {
  options_.documents.separator = "blank-line";
  ExpectDocuments({File("a.txt", "a\nb\n\n \t\nc\r\n\r\nd")}, {"a\nb\n", "c\r\n", "d"});
  options_.documents.separator = "/-{3,}|#\\d+/";
  ExpectDocuments({File("a.txt", "#1\na -----\n--\n----\nb\n#22\nc\n#22 d\n")},
                  {"a -----\n--\n", "b\n", "c\n#22 d\n"});
  const std::string long_line(200000, '-');  // matches, but is too long to be a separator
  ExpectDocuments({File("a.txt", "a\n" + long_line + "\n---\nb")}, {"a\n" + long_line + "\n", "b"});
  options_.documents.separator = "/(/";
  EXPECT_HAS(ErrorOf({File("a.txt", "a")}), "--document-separator /(/");
  options_.documents.separator = "\\x";
  EXPECT_HAS(ErrorOf({File("a.txt", "a")}), "--document-separator");
}

TEST_F(PrepareTest, Jsonl) {
  const std::string lines =
      "\xEF\xBB\xBF{\"text\": \"one\\n\\u00e9\", \"n\": [1, {\"text\": \"no\"}]}\n\n"
      "{\"id\": 1, \"text\": \"\"}\r\n{\"body\": \"b\", \"text\": \"two\"}";
  ExpectDocuments({File("a.jsonl", lines)}, {"one\n\u00e9", "two"});
  options_.documents.text_field = "body";
  EXPECT_HAS(ErrorOf({File("a.jsonl", lines)}),
             "a.jsonl, line 1: expected an object with the field");
  ExpectDocuments({File("b.JSONL", "{\"body\": \"x\"}\n")}, {"x"});
  options_.documents.text_field = "text";
  EXPECT_HAS(ErrorOf({File("a.jsonl", "{\"text\": 1}")}), "line 1: expected a string");
  EXPECT_HAS(ErrorOf({File("a.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \"b\"\n")}), "line 3");
  EXPECT_HAS(ErrorOf({File("a.jsonl", "[1]\n")}), "expected an object");
  EXPECT_HAS(ErrorOf({File("a.jsonl", "{\"text\": \"\xff\"}\n")}), "line 1");
  options_.documents.max_line_bytes = 100;
  const std::string just = "{\"text\": \"" + std::string(87, 'x') + "\"}\n";
  EXPECT_EQ(ErrorOf({File("a.jsonl", just)}), "no error");
  EXPECT_HAS(ErrorOf({File("a.jsonl", "{}\n"), File("b.jsonl", std::string(3 << 20, ' '))}),
             "a.jsonl, line 1");
  EXPECT_HAS(ErrorOf({File("b.jsonl", "\n" + just.substr(0, 99) + " \n")}),
             "b.jsonl, line 2: expected at most 100 bytes");
  EXPECT_HAS(ErrorOf({File("b.jsonl", std::string(3 << 20, ' '))}), "expected at most 100 bytes");
}

TEST_F(PrepareTest, Folders) {
  File("in/b.txt", "B text");
  File("in/a/z.md", "Z text");
  File("in/a/y.jsonl", "{\"text\": \"Y text\"}");
  File("in/a.txt", "A text");
  File("in/photo.jpg", "xxxx");
  File("in/binary.txt", std::string("ab\0cd", 5));
  fs::create_symlink("nowhere", dir_ / "in/dangling.txt");
  ExpectDocuments({dir_ / "in"}, {"A text", "Y text", "Z text", "B text"});
  EXPECT_HAS(notes_, "binary.txt: left out: a NUL byte");
  EXPECT_HAS(notes_, "left out 1 files");
  EXPECT_HAS(ErrorOf({dir_ / "in/binary.txt"}),
             "binary.txt: expected text, got a NUL byte at byte 2");
  fs::create_directory(dir_ / "empty");
  EXPECT_HAS(ErrorOf({dir_ / "empty"}), "no text file in this folder");
  EXPECT_HAS(ErrorOf({dir_ / "missing"}), "missing");
}

TEST_F(PrepareTest, NoText) {
  EXPECT_HAS(ErrorOf({File("a.txt", ""), File("b.jsonl", "\n")}), "the input has no text");
  EXPECT_HAS(ErrorOf({}), "at least one input");
  EXPECT_FALSE(fs::exists(options_.out_dir));
}

TEST_F(PrepareTest, SplitByDocument) {
  std::string lines;
  for (int i = 0; i < 2000; ++i) lines += fmt::format("{{\"text\": \"Document number {}\"}}\n", i);
  options_.inputs = {File("a.jsonl", lines)};
  options_.val_fraction = 0.1;
  const ShardManifest manifest = Prepare(options_, encoder_);
  EXPECT_EQ(manifest.train.documents + manifest.val.documents, 2000);
  EXPECT_NEAR(manifest.val.documents, 200, 55);  // 4 sigma
  std::vector<std::vector<int32_t>> train, val;
  for (int i = 0; i < 2000; ++i) {
    const bool drawn = i > 0 && Rng(42, RngPurpose::kSplit).Uniform(i) < 0.1;
    (drawn ? val : train).push_back(encoder_.encode(fmt::format("Document number {}", i)));
  }
  EXPECT_EQ(Documents(Split::kTrain), train);
  EXPECT_EQ(Documents(Split::kVal), val);
  const auto files = OutFiles();
  Prepare(options_, encoder_);
  EXPECT_EQ(OutFiles(), files);
  options_.seed = 43;
  Prepare(options_, encoder_);
  EXPECT_NE(OutFiles(), files);
}

TEST_F(PrepareTest, FewDocumentsStillSplit) {
  options_.val_fraction = 1e-9;
  options_.inputs = {File("a.txt", "one"), File("b.txt", "two"), File("c.txt", "three")};
  Prepare(options_, encoder_);
  EXPECT_EQ(Documents(Split::kTrain).size(), 2);
  EXPECT_EQ(Documents(Split::kVal), std::vector<std::vector<int32_t>>{encoder_.encode("three")});
  options_.val_fraction = 0.999;
  Prepare(options_, encoder_);
  EXPECT_EQ(Documents(Split::kTrain), std::vector<std::vector<int32_t>>{encoder_.encode("one")});
}

TEST_F(PrepareTest, OneDocumentGivesItsTail) {
  for (const size_t bytes : {size_t{2000}, size_t{100000}, size_t{3000000}}) {
    const std::string text = Words(5, bytes);
    options_.inputs = {File("a.txt", text)};
    options_.val_fraction = 0.2;
    notes_.clear();
    const ShardManifest manifest = Prepare(options_, encoder_);
    EXPECT_HAS(notes_, "only one document, so its last 20.0 %");
    EXPECT_EQ(manifest.train.documents, 1);
    EXPECT_EQ(manifest.val.documents, 1);
    EXPECT_EQ(manifest.train.text_bytes + manifest.val.text_bytes, text.size());
    EXPECT_NEAR(manifest.val.text_bytes, 0.2 * text.size(), 400);
    auto ids = Documents(Split::kTrain)[0];
    const auto tail = Documents(Split::kVal)[0];
    EXPECT_EQ(ids, encoder_.encode(text.substr(0, manifest.train.text_bytes)));
    ids.insert(ids.end(), tail.begin(), tail.end());
    EXPECT_EQ(ids, encoder_.encode(text));
  }
  EXPECT_HAS(ErrorOf({File("a.txt", "tiny")}), "no place to cut a validation split");
}

TEST_F(PrepareTest, LongDocumentsHaveTheIdsOfTheWhole) {
  for (const char* regex : {kGpt2Regex, kLlama3Regex, kO200kRegex}) {
    encoder_.encode = RegexEncoder(regex);
    const std::string a = Words(1, 9 << 20), b = Words(2, 200000), c = Words(3, 70000);
    ExpectDocuments({File("a.txt", a), File("b.txt", b), File("c.txt", c)}, {a, b, c});
  }
  EXPECT_EQ(notes_, "");
}

// The 256 bytes as single tokens, and " the" by merges.
TEST_F(PrepareTest, ByteLevelTokenizer) {
  std::vector<std::string> alphabet;
  for (int c = 0, next = 256; c < 256; ++c) {
    const bool shown = (c > 32 && c < 127) || (c > 160 && c != 173);
    const int code = shown ? c : next++;
    alphabet.push_back(code < 128 ? std::string(1, code)
                                  : std::string{char(0xC0 | code >> 6), char(0x80 | (code & 63))});
  }
  Json vocab = {{"<|end|>", 0}};
  for (const std::string& c : alphabet) vocab[c] = vocab.size();
  Json merges = Json::array();
  for (const auto& [left, right] :
       {std::pair("\u0120", "t"), {"\u0120t", "h"}, {"\u0120th", "e"}}) {
    merges.push_back({left, right});
    vocab[std::string(left) + right] = vocab.size();
  }
  const Json json = {
      {"version", "1.0"},
      {"added_tokens", {{{"id", 0}, {"content", "<|end|>"}, {"special", true}}}},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}};
  File("tok/tokenizer.json", json.dump());
  EXPECT_THROW(EncoderOf(*Tokenizer::Load(dir_ / "tok"), false), Error);  // no eos
  File("tok/tokenizer_config.json", "{\"eos_token\": \"<|end|>\"}");
  const auto tokenizer = Tokenizer::Load(dir_ / "tok");
  encoder_ = EncoderOf(*tokenizer, false);
  EXPECT_EQ(encoder_.sha256, Sha256File(dir_ / "tok/tokenizer.json"));

  const std::string text = Words(11, 500000) + "<|end|> a\xff b " + Words(12, 500000);
  ExpectDocuments({File("a.txt", text)}, {text});
  const auto ids = Documents(Split::kTrain)[0];
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 0), 0);
  EXPECT_EQ(tokenizer->Decode(ids), text);
  encoder_ = EncoderOf(*tokenizer, true);
  ExpectDocuments({File("a.txt", text)}, {text});
  const auto parsed = Documents(Split::kTrain)[0];
  EXPECT_EQ(std::count(parsed.begin(), parsed.end(), 0), 1);
}

TEST_F(PrepareTest, WithoutAPlaceToCut) {
  std::string text;
  while (text.size() < (5 << 19)) text += "\u65e5\u672c";
  options_.inputs = {File("a.txt", text + " end")};
  options_.val_fraction = 0;
  // Ids are code units here, so a cut inside a character would show.
  encoder_.encode = RegexEncoder("\\X");
  Prepare(options_, encoder_);
  EXPECT_EQ(Documents(Split::kTrain)[0], encoder_.encode(text + " end"));
  EXPECT_HAS(notes_, "2 times 1024 KiB of text had no word boundary");
}

TEST_F(PrepareTest, SameBytesAtAnyThreadCount) {
  std::string lines;
  for (int i = 0; i < 3000; ++i) {
    std::string text = Words(i, i % 500 == 0 ? 300000 : 20 * (i % 100));
    for (size_t at = 0; (at = text.find('\n', at)) != std::string::npos; at += 2) {
      text.replace(at, 1, "\\n");
    }
    lines += "{\"text\": \"" + text + "\"}\n";
  }
  options_.inputs = {File("a.jsonl", lines), File("b.txt", Words(9999, 2 << 20))};
  options_.shard_tokens = 100000;
  const int threads = NumThreads();
  SetNumThreads(1);
  Prepare(options_, encoder_);
  const auto files = OutFiles();
  EXPECT_GT(files.size(), 8);
  for (const int n : {2, 5}) {
    SetNumThreads(n);
    Prepare(options_, encoder_);
    EXPECT_TRUE(OutFiles() == files) << n;
  }
  SetNumThreads(threads);
}

TEST_F(PrepareTest, OutFolderIsGuarded) {
  const std::string a = File("a.txt", Words(1, 5000));
  File("out/precious", "data");
  EXPECT_HAS(ErrorOf({a}), "expected a new, empty or shard folder");
  EXPECT_TRUE(fs::exists(dir_ / "out/precious"));
  File("out/manifest.json", "{\"format\": \"webpack\"}");
  EXPECT_HAS(ErrorOf({a}), "expected format detour-token-shards");
  fs::remove_all(dir_ / "out");
  File("out", "a file");
  EXPECT_HAS(ErrorOf({a}), "expected a new, empty or shard folder");
  fs::remove(dir_ / "out");
  fs::create_directory(dir_ / "out");
  EXPECT_EQ(ErrorOf({a}), "no error");
  options_.out_dir = dir_ / "new/parent/out";
  EXPECT_EQ(ErrorOf({a}), "no error");
  options_.overwrite = false;
  EXPECT_HAS(ErrorOf({a}), "--overwrite");
}

TEST_F(PrepareTest, AFailedRunLeavesTheOldShards) {
  options_.inputs = {File("a.txt", Words(1, 3000000))};
  Prepare(options_, encoder_);
  const auto files = OutFiles();
  int calls = 0;
  options_.cancelled = [&] { return ++calls == 5; };
  EXPECT_HAS(ErrorOf(options_.inputs), "interrupted");
  EXPECT_EQ(OutFiles(), files);
  options_.cancelled = [] { return false; };
  for (int n = 1; n <= 4; ++n) {
    setenv("DETOUR_FAIL_POINT", fmt::format("write:{}", n).c_str(), 1);
    const std::string message = ErrorOf(options_.inputs);
    unsetenv("DETOUR_FAIL_POINT");
    EXPECT_HAS(message, "io.write");
    EXPECT_EQ(OutFiles(), files);
  }
}

TEST_F(PrepareTest, ProgressAndPlan) {
  const std::string text = Words(1, 3000000);
  options_.inputs = {File("a.txt", text), File("b.txt", "end")};
  PrepareProgress last;
  options_.progress = [&](const PrepareProgress& p) {
    EXPECT_GE(p.bytes, last.bytes);
    last = p;
  };
  const PreparePlan plan = PlanPrepare(options_);
  EXPECT_EQ(plan.documents, 2);
  EXPECT_EQ(plan.val_documents, 1);
  EXPECT_EQ(plan.text_bytes, text.size() + 3);
  EXPECT_EQ(plan.sources.size(), 2);
  EXPECT_FALSE(fs::exists(options_.out_dir));
  const ShardManifest manifest = Prepare(options_, encoder_);
  EXPECT_EQ(last.bytes, last.total_bytes);
  EXPECT_EQ(last.total_bytes, text.size() + 3);
  EXPECT_EQ(last.documents, 2);
  EXPECT_EQ(last.tokens, manifest.train.tokens + manifest.val.tokens);
}

TEST_F(PrepareTest, StandardInput) {
  const std::string text = Words(3, 2500000);
  const int saved = dup(STDIN_FILENO);
  ASSERT_TRUE(freopen(File("a.txt", text).c_str(), "rb", stdin));
  ExpectDocuments({"-"}, {text});
  dup2(saved, STDIN_FILENO);
  close(saved);
  const ShardManifest manifest = ReadManifest(options_.out_dir);
  EXPECT_EQ(manifest.sources[0].name, "-");
  EXPECT_EQ(manifest.sources[0].sha256, Sha256Hex(text));
  EXPECT_EQ(OutFiles().size(), 2);  // manifest and one shard
  EXPECT_HAS(ErrorOf({"-", "-"}), "at most once");
}

}  // namespace
}  // namespace detour::data
