// Byte-level BPE: what a tokenizer.json of that family says, and the tokenizer made of it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "data/pretokenize.h"
#include "data/tokenizer.h"

namespace detour::data {

/// A token that is found in the raw text before everything else.
struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;
};

/// The content of a tokenizer.json of the byte-level BPE family.
struct BpeSpec {
  /// By id, spelled in byte characters (see ByteCharacters); "" where the model has no token.
  std::vector<std::string> vocab;
  /// In order of rank. Both ids and the concatenation of their tokens are in `vocab`.
  std::vector<std::pair<int32_t, int32_t>> merges;
  bool ignore_merges = false;  ///< a pre-token that is a token is not built by merges
  bool fuse_unk = false;
  std::optional<int32_t> unk_id;  ///< for bytes without a token; without it they are dropped
  std::vector<AddedToken> added_tokens;
  std::vector<PretokenStep> pretokenize;
  std::vector<int32_t> prefix_ids, suffix_ids;  ///< around one text, by the post-processor
};

/// GPT-2's alphabet: the UTF-8 character that stands for each byte in a vocabulary.
const std::array<std::string, 256>& ByteCharacters();

/// The bytes that `token` stands for, or nothing if it has a character outside the alphabet.
std::optional<std::string> BytesOfToken(std::string_view token);

/// Reads the text of a tokenizer.json. Error("data.tokenizer" or "json") naming `name` and the
/// component that is malformed or not of the byte-level BPE family.
BpeSpec ParseTokenizerJson(std::string_view json, const std::string& name);

/// A tokenizer.json that `tokenizers` loads: null normalizer and post-processor, GPT-2's ByteLevel
/// pre-tokenizer (the only one that is written: requires spec.pretokenize to be it).
std::string WriteTokenizerJson(const BpeSpec& spec);

/// The one step that a ByteLevel pre-tokenizer without prefix space is.
std::vector<PretokenStep> Gpt2Pretokenize();

/// Open-addressing map from a pair of ids to its rank and result.
class MergeTable {
 public:
  struct Entry {
    uint64_t key;
    int32_t rank, id;
  };
  explicit MergeTable(size_t num_merges);
  /// The last of two entries with one key counts.
  void Insert(int32_t left, int32_t right, int32_t rank, int32_t id);
  /// Null if the pair does not merge.
  const Entry* Find(int32_t left, int32_t right) const;

 private:
  size_t Slot(uint64_t key) const { return key * 0x9E3779B97F4A7C15u >> shift_; }
  std::vector<Entry> slots_;
  int shift_;
};

/// Finds added tokens: leftmost, the longest first.
class AddedTokenFinder {
 public:
  void Add(const AddedToken& token, int32_t idx);
  /// The first match at or after `start`: its begin, end and the idx it was added with.
  struct Match {
    size_t begin, end;
    int32_t idx;
  };
  bool Find(std::string_view text, size_t start, Match* match) const;

 private:
  std::array<bool, 256> first_{};
  std::unordered_map<uint64_t, uint32_t> edges_;  // node << 8 | byte -> node
  std::vector<int32_t> idx_ = {-1};               // of the token that ends at a node, or -1
};

class BpeTokenizer final : public Tokenizer {
 public:
  /// Requires a spec as ParseTokenizerJson returns it.
  explicit BpeTokenizer(BpeSpec spec);
  ~BpeTokenizer() override;

  std::string DecodeToken(int32_t id) const override;
  std::string TokenText(int32_t id) const override;
  std::optional<int32_t> TokenId(std::string_view text) const override;
  bool IsSpecial(int32_t id) const override;

 protected:
  std::vector<int32_t> EncodeText(std::string_view text,
                                  const EncodeOptions& options) const override;

 private:
  struct Scratch;
  struct Call;
  std::unique_ptr<Scratch> AcquireScratch() const;

  void EncodePiece(std::string_view text, const AddedTokenFinder& finder, bool last,
                   Call& call) const;
  void EncodeWord(std::string_view word, Call& call) const;
  void AppendBytes(std::string_view bytes, std::vector<int32_t>* ids) const;
  void MergeWord(std::string_view word, Scratch& scratch) const;
  void MergeShort(std::vector<int32_t>* ids) const;
  void MergeLong(std::vector<int32_t>* ids) const;
  bool StandsAlone(std::string_view text, size_t begin, size_t end, Scratch& scratch) const;

  BpeSpec spec_;
  std::array<int32_t, 256> byte_id_;
  MergeTable merges_;
  Pretokenizer pretokenizer_;
  Regex word_character_;
  AddedTokenFinder raw_finder_, normalized_finder_;
  std::vector<std::string> bytes_;                        // by id
  std::vector<bool> special_;                             // by id
  std::unordered_map<std::string, int32_t> id_of_bytes_;  // with ignore_merges only
  std::unordered_map<std::string, int32_t> id_of_text_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Scratch>> free_;  // guarded by mutex_
};

}  // namespace detour::data
