// Trains byte-level BPE with the merges of `tokenizers`' BpeTrainer.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "data/bpe_tokenizer.h"

namespace detour::data {

struct BpeTrainOptions {
  int32_t vocab_size = 4096;  ///< special tokens and the 256 bytes included
  int64_t min_frequency = 2;  ///< pairs that occur less often do not merge
  /// They take the first ids. The first one is bos and eos of WriteTokenizerDir.
  std::vector<std::string> special_tokens = {"<|endoftext|>"};
  /// Of the table of distinct words; beyond it the rarest words are forgotten.
  int64_t max_table_bytes = int64_t{512} << 20;
};

/// Counts the pre-tokens of text that arrives in parts (memory: the table and a few MB), then finds
/// the merges: always the pair that occurs most often, of equal ones that of the least ids. The
/// result is that of BpeTrainer with initial_alphabet = all 256 bytes, trained by
/// train_from_iterator over the texts between EndText calls, with the pre-tokenizer
/// ByteLevel(add_prefix_space=false). It can differ only if the table overflows, or for a pre-token
/// beyond 64 KiB, which is counted in pieces. Bytes that are not UTF-8 are not counted. Not
/// thread-safe.
class BpeTrainer {
 public:
  /// Error("data.tokenizer") for a vocabulary smaller than the bytes and special tokens, or a
  /// special token that is empty, given twice or not UTF-8.
  explicit BpeTrainer(BpeTrainOptions options);

  /// The next part of the current text; may end anywhere, within a character too.
  void Feed(std::string_view part);
  /// No pre-token reaches over this point.
  void EndText();

  /// Requires a call of EndText after the last Feed. The vocabulary is smaller than asked where the
  /// text does not have enough pairs.
  BpeSpec Train() const;

  int64_t num_words() const { return num_words_; }
  int64_t num_distinct_words() const { return static_cast<int64_t>(words_.size()); }

 private:
  struct StringHash {
    using is_transparent = void;
    size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
  };

  void Count(bool at_end);
  void AddWord(std::string_view word);
  void ForgetRareWords();

  BpeTrainOptions options_;
  Pretokenizer pretokenizer_;
  Regex::Scratch scratch_;
  std::string buffer_;                     // not counted yet
  size_t count_at_bytes_ = 0;              // Feed counts when the buffer is so long
  std::vector<std::string_view> pending_;  // of Count: pre-tokens of the buffer
  std::unordered_map<std::string, int64_t, StringHash, std::equal_to<>> words_;
  int64_t table_bytes_ = 0, num_words_ = 0;
};

/// Writes tokenizer.json and tokenizer_config.json (bos = eos = `end_token`), each whole or not at
/// all, into the directory `path`, which is made if absent and keeps its other files. `tokenizers`
/// and transformers' PreTrainedTokenizerFast load it.
void WriteTokenizerDir(const BpeSpec& spec, const std::string& end_token, const std::string& path);

}  // namespace detour::data
