#include "data/bpe_trainer.h"

#include <algorithm>
#include <filesystem>
#include <queue>
#include <set>

#include "core/error.h"
#include "core/json.h"
#include "data/utf8.h"
#include "io/atomic.h"

namespace detour::data {
namespace {

constexpr size_t kBlockBytes = size_t{1} << 20;
constexpr size_t kMaxBufferBytes = size_t{16} << 20;
constexpr size_t kMaxWordBytes = size_t{1} << 16;
// A table entry beside its characters: node, string, bucket.
constexpr int64_t kEntryBytes = 80;

using Pair = uint64_t;
Pair MakePair(int32_t left, int32_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
}
int32_t Left(Pair pair) { return static_cast<int32_t>(pair >> 32); }
int32_t Right(Pair pair) { return static_cast<int32_t>(pair); }

struct Word {
  std::vector<int32_t> ids;
  int64_t count;
};

/// The merge loop. It follows BpeTrainer step by step, so that the results agree also where its
/// bookkeeping is lazy: counts in the queue are corrected only when they come up, a merged pair
/// keeps its count, and a token that two pairs spell exists once.
class MergeLoop {
 public:
  MergeLoop(BpeSpec* spec, std::vector<Word> words, const BpeTrainOptions& options)
      : spec_(*spec), words_(std::move(words)), options_(options) {
    for (size_t id = 0; id < spec_.vocab.size(); ++id) {
      id_of_.emplace(spec_.vocab[id], static_cast<int32_t>(id));
    }
    for (size_t w = 0; w < words_.size(); ++w) {
      const Word& word = words_[w];
      for (size_t i = 0; i + 1 < word.ids.size(); ++i) {
        Change(MakePair(word.ids[i], word.ids[i + 1]), word.count, static_cast<uint32_t>(w));
      }
    }
    PushChanged();
  }

  void Run() {
    while (static_cast<int64_t>(spec_.vocab.size()) < options_.vocab_size && !queue_.empty()) {
      Candidate top = std::move(const_cast<Candidate&>(queue_.top()));
      queue_.pop();
      const int64_t count = counts_.at(top.pair);
      if (top.count != count) {
        top.count = count;
        queue_.push(std::move(top));
        continue;
      }
      if (count < std::max<int64_t>(options_.min_frequency, 1)) break;
      const int32_t left = Left(top.pair), right = Right(top.pair);
      const std::string token = spec_.vocab[left] + spec_.vocab[right];
      const auto [it, is_new] = id_of_.emplace(token, static_cast<int32_t>(spec_.vocab.size()));
      if (is_new) spec_.vocab.push_back(token);
      merges_.push_back(top.pair);
      for (const uint32_t w : top.words) MergeIn(w, left, right, it->second);
      PushChanged();
    }
    WriteMerges();
  }

 private:
  struct Candidate {
    int64_t count;
    Pair pair;
    std::vector<uint32_t> words;                    // where it may occur
    bool operator<(const Candidate& other) const {  // the queue's top is its greatest
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };

  void Change(Pair pair, int64_t delta, uint32_t word_idx) {
    counts_[pair] += delta;
    if (delta <= 0) return;
    std::vector<uint32_t>& words = changed_[pair];
    if (words.empty() || words.back() != word_idx) words.push_back(word_idx);
  }

  void PushChanged() {
    for (auto& [pair, words] : changed_) {
      const int64_t count = counts_.at(pair);
      if (count > 0) queue_.push({count, pair, std::move(words)});
    }
    changed_.clear();
  }

  void MergeIn(uint32_t word_idx, int32_t left, int32_t right, int32_t merged) {
    std::vector<int32_t>& ids = words_[word_idx].ids;
    const int64_t count = words_[word_idx].count;
    size_t out = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] != left || i + 1 == ids.size() || ids[i + 1] != right) {
        ids[out++] = ids[i];
        continue;
      }
      if (out > 0) {
        Change(MakePair(ids[out - 1], left), -count, word_idx);
        Change(MakePair(ids[out - 1], merged), count, word_idx);
      }
      if (i + 2 < ids.size()) {
        Change(MakePair(right, ids[i + 2]), -count, word_idx);
        Change(MakePair(merged, ids[i + 2]), count, word_idx);
      }
      ids[out++] = merged;
      ++i;
    }
    ids.resize(out);
  }

  // A pair that came up twice has the rank of the last time.
  void WriteMerges() {
    std::unordered_map<Pair, size_t> last;
    for (size_t i = 0; i < merges_.size(); ++i) last[merges_[i]] = i;
    for (size_t i = 0; i < merges_.size(); ++i) {
      if (last[merges_[i]] == i) spec_.merges.emplace_back(Left(merges_[i]), Right(merges_[i]));
    }
  }

  BpeSpec& spec_;
  std::vector<Word> words_;
  const BpeTrainOptions& options_;
  std::unordered_map<std::string, int32_t> id_of_;
  std::unordered_map<Pair, int64_t> counts_;
  std::unordered_map<Pair, std::vector<uint32_t>> changed_;  // since the last PushChanged
  std::priority_queue<Candidate> queue_;
  std::vector<Pair> merges_;
};

bool HasInk(std::string_view word) {
  return word.find_first_not_of(" \t\r\n\v\f") != std::string_view::npos;
}

}  // namespace

BpeTrainer::BpeTrainer(BpeTrainOptions options)
    : options_(std::move(options)), pretokenizer_(Gpt2Pretokenize()) {
  std::set<std::string_view> seen;
  for (const std::string& token : options_.special_tokens) {
    if (token.empty() || ValidUtf8Prefix(token) != token.size() || !seen.insert(token).second) {
      Fail("data.tokenizer", "special token \"{}\": expected UTF-8 that is not empty, given once",
           Printable(token));
    }
  }
  const int64_t least = 256 + static_cast<int64_t>(seen.size());
  if (options_.vocab_size < least) {
    Fail("data.tokenizer",
         "vocabulary size {}: expected at least {} (256 bytes, {} special tokens)",
         options_.vocab_size, least, seen.size());
  }
}

void BpeTrainer::Feed(std::string_view part) {
  while (!part.empty()) {
    const size_t n = std::min(part.size(), kBlockBytes);
    buffer_ += part.substr(0, n);
    part.remove_prefix(n);
    if (buffer_.size() >= std::max(count_at_bytes_, kBlockBytes)) Count(false);
  }
}

void BpeTrainer::EndText() { Count(true); }

// Before the end of the text the last pre-tokens stay in the buffer: what follows may change them.
// A pattern looks at most one character beyond a pre-token, except in a run of white space, and
// "'re" may so far be "'" and "r": three pre-tokens with ink are enough to keep.
void BpeTrainer::Count(bool at_end) {
  pending_.clear();
  std::string_view rest = buffer_;
  while (!rest.empty()) {
    const size_t valid = ValidUtf8Prefix(rest);
    if (valid > 0) {
      pretokenizer_.Split(rest.substr(0, valid), {}, &scratch_,
                          [&](std::string_view word) { pending_.push_back(word); });
    }
    rest.remove_prefix(valid);
    if (!rest.empty()) rest.remove_prefix(ReadUtf8Head(rest).length);
  }
  size_t count = pending_.size();
  if (!at_end) {
    for (int kept_ink = 0; count > 0 && kept_ink < 3; --count)
      kept_ink += HasInk(pending_[count - 1]);
  }
  size_t done = at_end                    ? buffer_.size()
                : count < pending_.size() ? pending_[count].data() - buffer_.data()
                                          : 0;
  if (done == 0 && buffer_.size() > kMaxBufferBytes) {
    // One endless pre-token: cut it here, though not within a character.
    count = pending_.size();
    done = buffer_.size();
    for (size_t tail = 1; tail <= 3; ++tail) {
      const Utf8Head head = ReadUtf8Head(std::string_view(buffer_).substr(buffer_.size() - tail));
      if (head.kind == Utf8Kind::kIncomplete) done = buffer_.size() - tail;
    }
  }
  for (size_t i = 0; i < count; ++i) AddWord(pending_[i]);
  buffer_.erase(0, done);
  // Twice what is left: a buffer that grows is looked through a bounded number of times.
  count_at_bytes_ = 2 * buffer_.size();
}

void BpeTrainer::AddWord(std::string_view word) {
  for (; word.size() > kMaxWordBytes; word.remove_prefix(kMaxWordBytes)) {
    AddWord(word.substr(0, kMaxWordBytes));
  }
  ++num_words_;
  const auto it = words_.find(word);
  if (it != words_.end()) {
    ++it->second;
    return;
  }
  words_.emplace(word, 1);
  table_bytes_ += kEntryBytes + static_cast<int64_t>(word.size());
  if (table_bytes_ > options_.max_table_bytes) ForgetRareWords();
}

void BpeTrainer::ForgetRareWords() {
  for (int64_t rare = 1; table_bytes_ > options_.max_table_bytes / 2; rare *= 2) {
    std::erase_if(words_, [&](const auto& entry) {
      if (entry.second > rare) return false;
      table_bytes_ -= kEntryBytes + static_cast<int64_t>(entry.first.size());
      return true;
    });
  }
}

BpeSpec BpeTrainer::Train() const {
  DETOUR_CHECK(buffer_.empty(), "EndText is missing");
  BpeSpec spec;
  spec.pretokenize = Gpt2Pretokenize();
  for (const std::string& token : options_.special_tokens) {
    spec.added_tokens.push_back(
        {.id = static_cast<int32_t>(spec.vocab.size()), .content = token, .special = true});
    spec.vocab.push_back(token);
  }
  // The alphabet in the order of its characters' code points, which is that of their UTF-8.
  std::vector<std::string> alphabet(ByteCharacters().begin(), ByteCharacters().end());
  std::sort(alphabet.begin(), alphabet.end());
  for (const std::string& character : alphabet) {
    if (std::find(spec.vocab.begin(), spec.vocab.end(), character) == spec.vocab.end()) {
      spec.vocab.push_back(character);
    }
  }
  std::array<int32_t, 256> byte_ids;
  for (int b = 0; b < 256; ++b) {
    byte_ids[b] = static_cast<int32_t>(
        std::find(spec.vocab.begin(), spec.vocab.end(), ByteCharacters()[b]) - spec.vocab.begin());
  }
  std::vector<Word> words;
  words.reserve(words_.size());
  for (const auto& [text, count] : words_) {
    Word word{{}, count};
    for (const char c : text) word.ids.push_back(byte_ids[static_cast<uint8_t>(c)]);
    words.push_back(std::move(word));
  }
  MergeLoop(&spec, std::move(words), options_).Run();
  return spec;
}

void WriteTokenizerDir(const BpeSpec& spec, const std::string& end_token, const std::string& path) {
  const Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"bos_token", end_token},
                       {"eos_token", end_token},
                       {"clean_up_tokenization_spaces", false}};
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) Fail("data.tokenizer", "{}: {}", path, error.message());
  io::WriteFileAtomic(path + "/tokenizer_config.json", config.dump(2) + "\n");
  io::WriteFileAtomic(path + "/tokenizer.json", WriteTokenizerJson(spec));
}

}  // namespace detour::data
