// Byte pair encoding of one pre-token.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "data/bpe_spec.h"

namespace detour::data {

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

/// Immutable after construction; thread-safe with a Scratch per thread.
class BpeModel {
 public:
  /// Working memory and a cache of recent words.
  class Scratch {
   public:
    Scratch();
    ~Scratch();

   private:
    friend class BpeModel;
    struct Impl;
    std::unique_ptr<Impl> impl_;
  };

  /// Requires a spec as ParseTokenizerJson returns it.
  explicit BpeModel(const BpeSpec& spec);

  /// Appends the ids of a pre-token: well-formed UTF-8. Error("data.tokenizer") if it is longer
  /// than can be merged. Cost: n log n.
  void Encode(std::string_view word, Scratch* scratch, std::vector<int32_t>* ids) const;
  /// Appends the ids of bytes that are not UTF-8, one each.
  void EncodeBytes(std::string_view bytes, std::vector<int32_t>* ids) const;
  /// The id of a token of the vocabulary.
  std::optional<int32_t> TokenId(const std::string& token) const;

 private:
  void EncodePart(std::string_view word, Scratch* scratch, std::vector<int32_t>* ids) const;
  void Merge(std::string_view word, std::vector<int32_t>* ids) const;
  void Symbols(std::string_view word, std::vector<int32_t>* ids) const;
  int32_t CharacterId(uint32_t c, std::string_view text) const;
  bool FallBack(std::string_view text, std::vector<int32_t>* ids) const;
  void MergeShort(std::vector<int32_t>* ids) const;
  void MergeLong(std::vector<int32_t>* ids) const;
  bool MayCutAtMarks(const BpeSpec& spec) const;

  bool byte_level_, ignore_merges_, fuse_unk_, byte_fallback_;
  std::string prefix_, suffix_;
  int32_t unk_id_;                     // -1: none
  std::array<int32_t, 256> byte_id_;   // of a byte's token, or -1: "<0xNN>" unless byte_level_
  std::array<int32_t, 128> ascii_id_;  // or -1
  std::unordered_map<uint32_t, int32_t> character_id_;
  MergeTable merges_;
  std::unordered_map<std::string, int32_t> id_of_token_;
  std::unordered_map<std::string, int32_t> id_of_word_;  // with ignore_merges only
  bool cut_at_marks_;  // no merge reaches from another character over U+2581
};

}  // namespace detour::data
