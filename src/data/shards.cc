#include "data/shards.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <numeric>

#include "core/error.h"
#include "core/json.h"
#include "core/rng.h"
#include "core/sha256.h"
#include "io/atomic.h"
#include "io/posix.h"

namespace detour::data {
namespace {

static_assert(std::endian::native == std::endian::little, "shards are mapped as they lie");

constexpr char kMagic[8] = {'D', 'T', 'R', 'S', 'H', 'A', 'R', 'D'};
constexpr uint32_t kVersion = 1;
constexpr char kFormat[] = "detour-token-shards";
constexpr int64_t kMaxManifestBytes = int64_t{1} << 28;
constexpr size_t kWriteBytes = size_t{1} << 20;
constexpr int64_t kMaxCount = int64_t{1} << 53;  // also exact in JSON readers that use doubles

struct Header {
  char magic[8];
  uint32_t version, token_bytes;
  uint64_t num_tokens, num_documents;
  uint32_t vocab_size;
  uint8_t zero[28];
};
static_assert(sizeof(Header) == 64);

int TokenBytes(int32_t vocab_size) { return vocab_size <= 65536 ? 2 : 4; }
const char* DtypeName(int32_t vocab_size) { return TokenBytes(vocab_size) == 2 ? "u16" : "u32"; }

uint64_t AlignUp8(uint64_t n) { return (n + 7) / 8 * 8; }

std::string ShardFile(Split split, size_t idx) {
  return fmt::format("{}-{:05}.bin", SplitName(split), idx);
}

Json SplitJson(const SplitInfo& info) {
  Json shards = Json::array();
  for (const ShardInfo& s : info.shards) {
    shards.push_back(
        {{"file", s.file}, {"tokens", s.tokens}, {"documents", s.documents}, {"sha256", s.sha256}});
  }
  return {{"documents", info.documents},
          {"tokens", info.tokens},
          {"text_bytes", info.text_bytes},
          {"shards", std::move(shards)}};
}

const Json& Member(const Json& object, const char* key, Json::value_t type,
                   const std::string& name) {
  if (!object.is_object() || !object.contains(key) || object[key].type() != type) {
    Fail("data.shards", "{}: {} is missing or not {}", name, key,
         type == Json::value_t::array ? "an array" : "an object");
  }
  return object[key];
}

SplitInfo ReadSplit(const Json& splits, Split split, const std::string& name) {
  const std::string where = fmt::format("{}, split {}", name, SplitName(split));
  const Json& json = Member(splits, SplitName(split), Json::value_t::object, name);
  SplitInfo info;
  info.documents = GetInt(json, "documents", where, 0, kMaxCount);
  info.tokens = GetInt(json, "tokens", where, 0, kMaxCount);
  info.text_bytes = GetInt(json, "text_bytes", where, 0, kMaxCount);
  int64_t tokens = 0, documents = 0;
  for (const Json& s : Member(json, "shards", Json::value_t::array, where)) {
    ShardInfo shard{GetString(s, "file", where), GetInt(s, "tokens", where, 1, kMaxCount),
                    GetInt(s, "documents", where, 0, kMaxCount), GetString(s, "sha256", where)};
    // Also keeps a manifest from naming files outside its folder.
    const std::string expected = ShardFile(split, info.shards.size());
    if (shard.file != expected) {
      Fail("data.shards", "{}: expected shard {}, got {}", where, expected, Printable(shard.file));
    }
    tokens += shard.tokens;
    documents += shard.documents;
    if (tokens > info.tokens || documents > info.documents) break;
    info.shards.push_back(std::move(shard));
  }
  if (tokens != info.tokens || documents != info.documents) {
    Fail("data.shards", "{}: expected {} tokens in {} documents, its shards list {} in {}{}", where,
         info.tokens, info.documents, tokens, documents,
         tokens > info.tokens || documents > info.documents ? " or more" : "");
  }
  if (documents > tokens || (documents == 0) != (tokens == 0)) {
    Fail("data.shards", "{}: {} documents cannot have {} tokens", where, documents, tokens);
  }
  return info;
}

}  // namespace

const char* SplitName(Split split) { return split == Split::kTrain ? "train" : "val"; }

ShardManifest ReadManifest(const std::string& dir) {
  const std::string path = dir + "/manifest.json";
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    Fail("data.shards", "{}: no such file. Hint: `detour prepare` makes a shard folder", path);
  }
  const Json json = ParseJson(io::ReadFile(path, kMaxManifestBytes), path);
  if (const std::string format = GetString(json, "format", path); format != kFormat) {
    Fail("data.shards", "{}: expected format {}, got {}", path, kFormat, Printable(format));
  }
  if (const int64_t version = GetInt(json, "version", path); version != kVersion) {
    Fail("data.shards", "{}: expected version {}, got {}", path, kVersion, version);
  }
  ShardManifest m;
  m.vocab_size = static_cast<int32_t>(GetInt(json, "vocab_size", path, 1, INT32_MAX));
  m.eos_id = static_cast<int32_t>(GetInt(json, "eos_id", path, 0, m.vocab_size - 1));
  if (const std::string dtype = GetString(json, "dtype", path); dtype != DtypeName(m.vocab_size)) {
    Fail("data.shards", "{}: expected dtype {} for {} ids, got {}", path, DtypeName(m.vocab_size),
         m.vocab_size, Printable(dtype));
  }
  m.tokenizer_sha256 = GetString(json, "tokenizer_sha256", path);
  const Json& seed = json.contains("seed") ? json["seed"] : Json();
  if (!seed.is_number_unsigned()) Fail("data.shards", "{}: seed is missing or negative", path);
  m.seed = seed.get<uint64_t>();
  m.val_fraction = GetDouble(json, "val_fraction", path, 0, 1);
  const Json& splits = Member(json, "splits", Json::value_t::object, path);
  m.train = ReadSplit(splits, Split::kTrain, path);
  m.val = ReadSplit(splits, Split::kVal, path);
  for (const Json& s : Member(json, "sources", Json::value_t::array, path)) {
    m.sources.push_back({GetString(s, "name", path), GetInt(s, "bytes", path, 0, kMaxCount),
                         GetString(s, "sha256", path)});
  }
  return m;
}

void WriteManifest(const std::string& dir, const ShardManifest& m) {
  Json sources = Json::array();
  for (const SourceInfo& s : m.sources) {
    sources.push_back({{"name", s.name}, {"bytes", s.bytes}, {"sha256", s.sha256}});
  }
  const Json json = {{"format", kFormat},
                     {"version", kVersion},
                     {"dtype", DtypeName(m.vocab_size)},
                     {"vocab_size", m.vocab_size},
                     {"eos_id", m.eos_id},
                     {"tokenizer_sha256", m.tokenizer_sha256},
                     {"seed", m.seed},
                     {"val_fraction", m.val_fraction},
                     {"splits", {{"train", SplitJson(m.train)}, {"val", SplitJson(m.val)}}},
                     {"sources", std::move(sources)}};
  // A file name may be no UTF-8; it is only a label here.
  io::WriteFile(dir + "/manifest.json",
                json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

ShardWriter::ShardWriter(std::string dir, Split split, int32_t vocab_size, int64_t shard_tokens)
    : dir_(std::move(dir)), split_(split), vocab_size_(vocab_size), shard_tokens_(shard_tokens) {
  DETOUR_CHECK(vocab_size >= 1 && shard_tokens >= 1, "{}, {}", vocab_size, shard_tokens);
}

ShardWriter::~ShardWriter() = default;

void ShardWriter::Append(std::span<const int32_t> tokens) {
  for (const int32_t id : tokens) {
    DETOUR_CHECK(id >= 0 && id < vocab_size_, "id {} of {}", id, vocab_size_);
  }
  while (!tokens.empty()) {
    const int64_t n = std::min<int64_t>(tokens.size(), shard_tokens_ - num_tokens_);
    AppendToShard(tokens.first(n));
    tokens = tokens.subspan(n);
    if (num_tokens_ == shard_tokens_) CloseShard();
  }
}

void ShardWriter::AppendToShard(std::span<const int32_t> tokens) {
  if (!file_) {
    file_ = std::make_unique<io::FileWriter>(dir_ + "/" + ShardFile(split_, done_.size()));
    buffer_.resize(sizeof(Header));  // filled in by CloseShard
  }
  if (document_begins_) begins_.push_back(num_tokens_);
  document_begins_ = false;
  num_tokens_ += tokens.size();
  if (TokenBytes(vocab_size_) == 4) {
    const auto bytes = std::as_bytes(tokens);
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  } else {
    const std::vector<uint16_t> narrow(tokens.begin(), tokens.end());
    const auto bytes = std::as_bytes(std::span(narrow));
    buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
  }
  if (buffer_.size() >= kWriteBytes) {
    file_->Write(buffer_);
    buffer_.clear();
  }
}

void ShardWriter::CloseShard() {
  const uint64_t token_bytes = static_cast<uint64_t>(num_tokens_) * TokenBytes(vocab_size_);
  buffer_.resize(buffer_.size() + AlignUp8(token_bytes) - token_bytes);
  file_->Write(buffer_);
  buffer_.clear();
  file_->Write(std::as_bytes(std::span(begins_)));
  Header header = {.magic = {},
                   .version = kVersion,
                   .token_bytes = static_cast<uint32_t>(TokenBytes(vocab_size_)),
                   .num_tokens = static_cast<uint64_t>(num_tokens_),
                   .num_documents = begins_.size(),
                   .vocab_size = static_cast<uint32_t>(vocab_size_),
                   .zero = {}};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  const std::string file = ShardFile(split_, done_.size()), path = dir_ + "/" + file;
  {
    const io::Fd fd(open(path.c_str(), O_WRONLY | O_CLOEXEC));
    if (fd.get() < 0 || io::FailPoint("write") ||
        pwrite(fd.get(), &header, sizeof(header), 0) != sizeof(header)) {
      io::FailErrno("io.write", path, "write");
    }
  }
  file_->Finish();
  file_.reset();
  done_.push_back({file, num_tokens_, static_cast<int64_t>(begins_.size()), Sha256File(path)});
  begins_.clear();
  num_tokens_ = 0;
}

std::vector<ShardInfo> ShardWriter::Finish() {
  if (file_) CloseShard();
  return std::move(done_);
}

TokenShards TokenShards::Open(const std::string& dir, Split split) {
  TokenShards shards;
  shards.dir_ = dir;
  shards.split_ = split;
  shards.manifest_ = ReadManifest(dir);
  if (shards.num_tokens() == 0) {
    Fail("data.shards",
         "{}: the {} split is empty. Hint: prepare it again with another --val-fraction", dir,
         SplitName(split));
  }
  int64_t tokens = 0, documents = 0;
  for (const ShardInfo& info : shards.info().shards) {
    Shard shard = shards.OpenShard(dir + "/" + info.file, info);
    if (tokens == 0 && (shard.begins.empty() || shard.begins[0] != 0)) {
      Fail("data.shards", "{}: expected a document at token 0, got none", shard.path);
    }
    shard.first_token = tokens;
    shard.first_document = documents;
    tokens += info.tokens;
    documents += info.documents;
    shards.shards_.push_back(std::move(shard));
  }
  int32_t last = 0;
  shards.Read(tokens - 1, {&last, 1});
  if (last != shards.eos_id()) {
    Fail("data.shards", "{}: expected the last token to be eos {}, got {}",
         shards.shards_.back().path, shards.eos_id(), last);
  }
  return shards;
}

TokenShards::Shard TokenShards::OpenShard(const std::string& path,
                                          const ShardInfo& expected) const {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) Fail("data.shards", "{}: the shard is missing", path);
  struct stat stat;
  const io::Fd fd = io::Fd::OpenRegular(path, &stat);
  const uint64_t size = stat.st_size;
  if (size < sizeof(Header)) {
    Fail("data.shards", "{}: expected a header of {} bytes, the file has {}", path, sizeof(Header),
         size);
  }
  void* address = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (address == MAP_FAILED) io::FailErrno("io.read", path, "map");
  Shard shard;
  shard.path = path;
  shard.num_bytes = size;
  shard.bytes = {static_cast<const std::byte*>(address),
                 [size](const std::byte* p) { munmap(const_cast<std::byte*>(p), size); }};

  Header header;
  std::memcpy(&header, address, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    Fail("data.shards", "{}: expected magic DTRSHARD, got {}", path,
         Printable({header.magic, sizeof(header.magic)}));
  }
  const auto check = [&](const char* what, uint64_t want, uint64_t got) {
    if (want != got) Fail("data.shards", "{}: expected {} {}, got {}", path, what, want, got);
  };
  check("version", kVersion, header.version);
  check("bytes per token", TokenBytes(vocab_size()), header.token_bytes);
  check("vocabulary size", vocab_size(), header.vocab_size);
  check("number of tokens", expected.tokens, header.num_tokens);
  check("number of documents", expected.documents, header.num_documents);
  // No overflow: ReadSplit bounds both counts by 2^53.
  const uint64_t table = sizeof(Header) + AlignUp8(header.num_tokens * header.token_bytes);
  check("file size in bytes", table + header.num_documents * sizeof(uint64_t), size);

  shard.num_tokens = expected.tokens;
  shard.tokens = shard.bytes.get() + sizeof(Header);
  shard.begins = {reinterpret_cast<const uint64_t*>(shard.bytes.get() + table),
                  header.num_documents};
  for (size_t i = 0; i < shard.begins.size(); ++i) {
    if (shard.begins[i] >= header.num_tokens || (i > 0 && shard.begins[i] <= shard.begins[i - 1])) {
      Fail("data.shards", "{}: document {} begins at token {}: expected rising and below {}", path,
           i, shard.begins[i], header.num_tokens);
    }
  }
  return shard;
}

const TokenShards::Shard& TokenShards::ShardOf(int64_t token) const {
  return *std::prev(
      std::upper_bound(shards_.begin(), shards_.end(), token,
                       [](int64_t t, const Shard& shard) { return t < shard.first_token; }));
}

void TokenShards::Read(int64_t first, std::span<int32_t> tokens) const {
  DETOUR_CHECK(first >= 0 && first + int64_t(tokens.size()) <= num_tokens(), "{} + {} of {}", first,
               tokens.size(), num_tokens());
  while (!tokens.empty()) {
    const Shard& shard = ShardOf(first);
    const int64_t begin = first - shard.first_token;
    const int64_t n = std::min<int64_t>(tokens.size(), shard.num_tokens - begin);
    uint32_t highest = 0;
    const auto copy = [&](const auto* ids) {  // aligned: Header has 64 bytes
      for (int64_t i = 0; i < n; ++i) {
        highest = std::max<uint32_t>(highest, ids[begin + i]);
        tokens[i] = static_cast<int32_t>(ids[begin + i]);
      }
    };
    if (TokenBytes(vocab_size()) == 2) {
      copy(reinterpret_cast<const uint16_t*>(shard.tokens));
    } else {
      copy(reinterpret_cast<const uint32_t*>(shard.tokens));
    }
    if (highest >= static_cast<uint32_t>(vocab_size())) {
      Fail("data.shards", "{}: expected ids below {}, got {} in tokens {} to {}", shard.path,
           vocab_size(), highest, begin, begin + n - 1);
    }
    first += n;
    tokens = tokens.subspan(n);
  }
}

int64_t TokenShards::DocumentOf(int64_t token) const {
  DETOUR_CHECK(token >= 0 && token < num_tokens(), "{} of {}", token, num_tokens());
  const Shard& shard = ShardOf(token);
  const uint64_t in_shard = token - shard.first_token;
  const auto next = std::upper_bound(shard.begins.begin(), shard.begins.end(), in_shard);
  return shard.first_document + (next - shard.begins.begin()) - 1;
}

int64_t TokenShards::DocumentBegin(int64_t document) const {
  DETOUR_CHECK(document >= 0 && document <= num_documents(), "{} of {}", document, num_documents());
  if (document == num_documents()) return num_tokens();
  // The last shard that starts at or before this document; later ones with an equal number hold no
  // begin before it.
  const Shard& shard =
      *std::prev(std::upper_bound(shards_.begin(), shards_.end(), document,
                                  [](int64_t d, const Shard& s) { return d < s.first_document; }));
  return shard.first_token + static_cast<int64_t>(shard.begins[document - shard.first_document]);
}

std::vector<int64_t> TokenShards::DocumentBegins(int64_t first, int64_t n) const {
  DETOUR_CHECK(first >= 0 && n >= 0 && first + n <= num_tokens(), "{} + {} of {}", first, n,
               num_tokens());
  std::vector<int64_t> begins;
  if (n == 0) return begins;
  int64_t document = DocumentOf(first);
  if (DocumentBegin(document) < first) ++document;
  for (int64_t begin; (begin = DocumentBegin(document)) < first + n; ++document) {
    begins.push_back(begin - first);
  }
  return begins;
}

void TokenShards::Locate(int64_t first, std::span<int32_t> documents,
                         std::span<int32_t> positions) const {
  DETOUR_CHECK(documents.size() == positions.size(), "{}, {}", documents.size(), positions.size());
  const std::vector<int64_t> begins = DocumentBegins(first, documents.size());
  size_t next = !begins.empty() && begins[0] == 0 ? 1 : 0;
  int32_t document = 0, position = 0;
  for (int64_t i = 0; i < documents.size(); ++i, ++position) {
    if (next < begins.size() && begins[next] == i) {
      ++next;
      ++document;
      position = 0;
    }
    documents[i] = document;
    positions[i] = position;
  }
}

void TokenShards::Verify() const {
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < shards_.size(); ++i) {
    const Shard& shard = shards_[i];
    const std::string sha256 =
        Sha256Hex({reinterpret_cast<const char*>(shard.bytes.get()), size_t(shard.num_bytes)});
    if (sha256 != info().shards[i].sha256) {
      Fail("data.shards", "{}: expected SHA-256 {}, got {}", shard.path,
           Printable(info().shards[i].sha256), sha256);
    }
    for (int64_t t = 0; t < shard.num_tokens; t += tokens.size()) {
      tokens.resize(std::min<int64_t>(1 << 16, shard.num_tokens - t));
      Read(shard.first_token + t, tokens);
    }
    for (const uint64_t begin : shard.begins) {
      const int64_t token = shard.first_token + static_cast<int64_t>(begin);
      int32_t before = eos_id();
      if (token > 0) Read(token - 1, {&before, 1});
      if (before != eos_id()) {
        Fail("data.shards", "{}: expected eos {} before the document at token {}, got {}",
             shard.path, eos_id(), begin, before);
      }
    }
  }
}

BatchSampler::BatchSampler(int64_t num_tokens, int64_t seq_len, uint64_t seed)
    : seq_len_(seq_len), num_sequences_((num_tokens - 1) / seq_len), seed_(seed) {
  DETOUR_CHECK(seq_len >= 1, "{}", seq_len);
  if (num_tokens <= seq_len) {
    Fail("data.shards",
         "expected at least one sequence of {} + 1 tokens, got {} tokens in all. Hint: "
         "use more text or a shorter --seq-len",
         seq_len, num_tokens);
  }
  a_ = static_cast<uint64_t>(std::ceil(std::sqrt(static_cast<double>(num_sequences_))));
  b_ = (num_sequences_ + a_ - 1) / a_;
}

int64_t BatchSampler::Sequence(int64_t global_index) const {
  DETOUR_CHECK(global_index >= 0, "{}", global_index);
  return seq_len_ * Permute(Epoch(global_index), global_index % num_sequences_);
}

// Mixed-radix Feistel (Black and Rogaway, CT-RSA 2002, "FE1"): each round is a bijection of [0, a)
// x [0, b). Repeating the network until the result is in range ("cycle walking") makes it a
// bijection of [0, num_sequences).
int64_t BatchSampler::Permute(uint64_t epoch, int64_t index) const {
  uint64_t x = index;
  do {
    uint64_t left = x / b_, right = x % b_;
    for (uint32_t round = 0; round < 8; ++round) {
      const Rng rng(seed_, RngPurpose::kData, static_cast<uint32_t>(epoch), round);
      if (round % 2 == 0) {
        left = (left + rng.Below(right, a_)) % a_;
      } else {
        right = (right + rng.Below(left, b_)) % b_;
      }
    }
    x = left * b_ + right;
  } while (x >= static_cast<uint64_t>(num_sequences_));
  return static_cast<int64_t>(x);
}

}  // namespace detour::data
