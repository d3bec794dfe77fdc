// Packed token shards: documents as token ids, end to end, memory-mapped. The format is
// docs/formats.md, "Token shards".
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace detour::io {
class FileWriter;
}

namespace detour::data {

enum class Split { kTrain, kVal };
const char* SplitName(Split split);  ///< "train", "val"

inline constexpr int64_t kShardTokens = int64_t{1} << 26;

struct ShardInfo {
  std::string file;
  int64_t tokens = 0, documents = 0;
  std::string sha256;
};

struct SplitInfo {
  int64_t documents = 0, tokens = 0, text_bytes = 0;
  std::vector<ShardInfo> shards;
};

struct SourceInfo {
  std::string name;
  int64_t bytes = 0;
  std::string sha256;
};

struct ShardManifest {
  int32_t vocab_size = 0;
  int32_t eos_id = 0;
  std::string tokenizer_sha256;
  uint64_t seed = 0;
  double val_fraction = 0;
  SplitInfo train, val;
  std::vector<SourceInfo> sources;
  const SplitInfo& split(Split s) const { return s == Split::kTrain ? train : val; }
};

/// DIR/manifest.json. Error("data.shards" or "json") if it is missing, malformed or contradicts
/// itself.
ShardManifest ReadManifest(const std::string& dir);
void WriteManifest(const std::string& dir, const ShardManifest& manifest);

/// Writes the shards of one split, in bounded memory. Not thread-safe. Error("io.write").
class ShardWriter {
 public:
  ShardWriter(std::string dir, Split split, int32_t vocab_size,
              int64_t shard_tokens = kShardTokens);
  ~ShardWriter();
  ShardWriter(const ShardWriter&) = delete;
  ShardWriter& operator=(const ShardWriter&) = delete;

  /// The next token appended begins a document. Requires that the one before it ended in eos.
  void BeginDocument() { document_begins_ = true; }
  /// Requires 0 <= id < vocab_size.
  void Append(std::span<const int32_t> tokens);
  /// Closes and fsyncs the last shard; ends the object. No shard at all if nothing was appended.
  std::vector<ShardInfo> Finish();

 private:
  void AppendToShard(std::span<const int32_t> tokens);
  void CloseShard();

  const std::string dir_;
  const Split split_;
  const int32_t vocab_size_;
  const int64_t shard_tokens_;
  std::unique_ptr<io::FileWriter> file_;  // null between shards
  std::vector<std::byte> buffer_;         // not yet given to file_
  std::vector<uint64_t> begins_;          // of the shard being written
  int64_t num_tokens_ = 0;                // in the shard being written
  bool document_begins_ = false;
  std::vector<ShardInfo> done_;
};

/// One split of a shard directory, mapped read-only. A document is named by its index in the split,
/// a token by its index in the split's stream. Thread-safe; copies share the mapping. Errors:
/// Error("data.shards") with file, expected and found.
class TokenShards {
 public:
  /// Checks everything but the token ids and the checksums; reads headers and document tables only.
  /// Error if the split is empty.
  static TokenShards Open(const std::string& dir, Split split);

  int64_t num_tokens() const { return info().tokens; }
  int64_t num_documents() const { return info().documents; }
  int64_t text_bytes() const { return info().text_bytes; }
  int32_t vocab_size() const { return manifest_.vocab_size; }
  int32_t eos_id() const { return manifest_.eos_id; }
  const std::string& tokenizer_sha256() const { return manifest_.tokenizer_sha256; }
  const ShardManifest& manifest() const { return manifest_; }

  /// Tokens [first, first + tokens.size()). Requires them in range; Error if an id is not below
  /// vocab_size.
  void Read(int64_t first, std::span<int32_t> tokens) const;

  /// The document that token `token` belongs to. O(log documents).
  int64_t DocumentOf(int64_t token) const;
  /// First token of a document; num_tokens() for document = num_documents().
  int64_t DocumentBegin(int64_t document) const;
  /// Begins of documents among tokens [first, first + n), relative to `first`, rising. 0 is among
  /// them only if a document begins exactly at `first`.
  std::vector<int64_t> DocumentBegins(int64_t first, int64_t n) const;

  /// For tokens [first, first + n), n = documents.size() = positions.size(), seen as one packed
  /// sequence: document number counted from 0 at `first`, and position counted from 0 at the later
  /// of `first` and the document's begin.
  void Locate(int64_t first, std::span<int32_t> documents, std::span<int32_t> positions) const;

  /// Reads everything: checksums, ids below vocab_size, eos before each document. Error at the
  /// first difference.
  void Verify() const;

 private:
  struct Shard {
    std::string path;
    std::shared_ptr<const std::byte> bytes;  // the mapped file
    int64_t num_bytes = 0;
    const std::byte* tokens = nullptr;
    std::span<const uint64_t> begins;  // relative to the shard
    int64_t first_token = 0, num_tokens = 0, first_document = 0;
  };

  const SplitInfo& info() const { return manifest_.split(split_); }
  Shard OpenShard(const std::string& path, const ShardInfo& expected) const;
  const Shard& ShardOf(int64_t token) const;

  std::string dir_;
  Split split_ = Split::kTrain;
  ShardManifest manifest_;
  std::vector<Shard> shards_;
};

/// The order of training data: which sequence of seq_len + 1 tokens (stride seq_len) is the g-th of
/// a run. A pure function of (num_tokens, seq_len, seed, g), so g is all a checkpoint stores. Every
/// epoch visits each sequence once, in an order of its own; O(1) memory and time. Thread-safe.
class BatchSampler {
 public:
  /// Error("data.shards") if there is not one sequence of seq_len + 1 tokens. Requires seq_len
  /// >= 1.
  BatchSampler(int64_t num_tokens, int64_t seq_len, uint64_t seed);

  int64_t num_sequences() const { return num_sequences_; }  ///< per epoch
  int64_t Epoch(int64_t global_index) const { return global_index / num_sequences_; }
  /// First token of sequence `global_index` >= 0.
  int64_t Sequence(int64_t global_index) const;

 private:
  int64_t Permute(uint64_t epoch, int64_t index) const;

  int64_t seq_len_, num_sequences_;
  uint64_t seed_;
  uint64_t a_, b_;  // the Feistel network permutes a_ * b_ >= num_sequences_ cells
};

}  // namespace detour::data
