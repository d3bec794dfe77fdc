#include "data/bpe_tokenizer.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <queue>

#include "core/error.h"
#include "data/utf8.h"

namespace detour::data {
namespace {

// Above this many symbols a heap finds the next merge, so that long words take n log n.
constexpr size_t kShortWord = 48;
// A pre-token beyond this would take gigabytes to merge; those of real data are far below.
constexpr size_t kMaxWordBytes = size_t{1} << 28;

/// Recent short words and their ids, direct-mapped: bounded, never allocates, a slot is one cache
/// line.
class WordCache {
 public:
  static constexpr size_t kMaxBytes = 30, kMaxIds = 8;
  struct alignas(64) Slot {
    uint8_t num_bytes = 0, num_ids = 0;
    char bytes[kMaxBytes];
    int32_t ids[kMaxIds];
  };

  /// The slot of `word`, which holds it or another; null for a word too long to keep.
  Slot* Find(std::string_view word) {
    if (word.size() > kMaxBytes) return nullptr;
    uint64_t hash = word.size() * kMultiplier;
    while (word.size() >= 8) {
      Mix(word, 8, &hash);
      word.remove_prefix(8);
    }
    Mix(word, word.size(), &hash);
    return &slots_[hash >> (64 - kLogSlots)];
  }
  static bool Holds(const Slot& slot, std::string_view word) {
    return slot.num_bytes == word.size() && !std::memcmp(slot.bytes, word.data(), word.size());
  }
  static void Store(std::string_view word, const std::vector<int32_t>& ids, Slot* slot) {
    if (ids.size() > kMaxIds) return;
    slot->num_bytes = static_cast<uint8_t>(word.size());
    slot->num_ids = static_cast<uint8_t>(ids.size());
    std::memcpy(slot->bytes, word.data(), word.size());
    std::copy(ids.begin(), ids.end(), slot->ids);
  }

 private:
  static constexpr int kLogSlots = 14;
  static constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15u;
  static void Mix(std::string_view word, size_t n, uint64_t* hash) {
    uint64_t bits = 0;
    std::memcpy(&bits, word.data(), n);
    *hash = (*hash ^ bits) * kMultiplier;
    *hash ^= *hash >> 29;
    *hash *= kMultiplier;
  }
  std::vector<Slot> slots_ = std::vector<Slot>(size_t{1} << kLogSlots);
};

bool IsWhiteSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

/// Where the white space that ends `text` begins.
size_t TrailingSpace(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    size_t begin = end - 1;
    while ((text[begin] & 0xC0) == 0x80) --begin;
    if (!IsWhiteSpace(DecodeUtf8(text.substr(begin), static_cast<int>(end - begin)))) break;
    end = begin;
  }
  return end;
}

/// Where the white space that `text` has at `begin` ends.
size_t SkipSpace(std::string_view text, size_t begin) {
  while (begin < text.size()) {
    const int length = ReadUtf8Head(text.substr(begin)).length;
    if (!IsWhiteSpace(DecodeUtf8(text.substr(begin), length))) break;
    begin += length;
  }
  return begin;
}

std::array<int32_t, 256> ByteIds(const BpeSpec& spec) {
  std::unordered_map<std::string_view, int32_t> ids;
  for (size_t id = 0; id < spec.vocab.size(); ++id) {
    ids.emplace(spec.vocab[id], static_cast<int32_t>(id));
  }
  std::array<int32_t, 256> byte_ids;
  for (int b = 0; b < 256; ++b) {
    const auto it = ids.find(ByteCharacters()[b]);
    byte_ids[b] = it == ids.end() ? -1 : it->second;
  }
  return byte_ids;
}

}  // namespace

const std::array<std::string, 256>& ByteCharacters() {
  static const std::array<std::string, 256> characters = [] {
    std::array<std::string, 256> table;
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      AppendUtf8(printable ? b : next++, &table[b]);
    }
    return table;
  }();
  return characters;
}

std::optional<std::string> BytesOfToken(std::string_view token) {
  static const std::unordered_map<std::string_view, char> byte_of = [] {
    std::unordered_map<std::string_view, char> table;
    for (int b = 0; b < 256; ++b) table.emplace(ByteCharacters()[b], static_cast<char>(b));
    return table;
  }();
  std::string bytes;
  while (!token.empty()) {
    const int length = ReadUtf8Head(token).length;
    const auto it = byte_of.find(token.substr(0, length));
    if (it == byte_of.end()) return std::nullopt;
    bytes += it->second;
    token.remove_prefix(length);
  }
  return bytes;
}

MergeTable::MergeTable(size_t num_merges) {
  const size_t capacity = std::bit_ceil(std::max<size_t>(2 * num_merges, 16));
  shift_ = 64 - std::countr_zero(capacity);
  slots_.assign(capacity, {std::numeric_limits<uint64_t>::max(), 0, 0});
}

void MergeTable::Insert(int32_t left, int32_t right, int32_t rank, int32_t id) {
  const uint64_t key = static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
  size_t i = Slot(key);
  while (slots_[i].key != std::numeric_limits<uint64_t>::max() && slots_[i].key != key) {
    i = (i + 1) & (slots_.size() - 1);
  }
  slots_[i] = {key, rank, id};
}

const MergeTable::Entry* MergeTable::Find(int32_t left, int32_t right) const {
  const uint64_t key = static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
  for (size_t i = Slot(key);; i = (i + 1) & (slots_.size() - 1)) {
    if (slots_[i].key == key) return &slots_[i];
    if (slots_[i].key == std::numeric_limits<uint64_t>::max()) return nullptr;
  }
}

void AddedTokenFinder::Add(const AddedToken& token, int32_t idx) {
  uint64_t node = 0;
  first_[static_cast<uint8_t>(token.content[0])] = true;
  for (const char c : token.content) {
    const auto [it, added] =
        edges_.try_emplace(node << 8 | static_cast<uint8_t>(c), static_cast<uint32_t>(idx_.size()));
    if (added) idx_.push_back(-1);
    node = it->second;
  }
  idx_[node] = idx;
}

bool AddedTokenFinder::Find(std::string_view text, size_t start, Match* match) const {
  if (edges_.empty()) return false;
  for (size_t begin = start; begin < text.size(); ++begin) {
    if (!first_[static_cast<uint8_t>(text[begin])]) continue;
    uint64_t node = 0;
    bool found = false;
    for (size_t i = begin; i < text.size(); ++i) {
      const auto it = edges_.find(node << 8 | static_cast<uint8_t>(text[i]));
      if (it == edges_.end()) break;
      node = it->second;
      if (idx_[node] < 0) continue;
      *match = {begin, i + 1, idx_[node]};
      found = true;
    }
    if (found) return true;
  }
  return false;
}

struct BpeTokenizer::Scratch {
  Regex::Scratch regex;
  WordCache cache;
  std::vector<int32_t> word;
};

/// One call of Encode.
struct BpeTokenizer::Call {
  const EncodeOptions& options;
  Scratch& scratch;
  std::vector<int32_t> ids;
};

BpeTokenizer::BpeTokenizer(BpeSpec spec)
    : spec_(std::move(spec)),
      byte_id_(ByteIds(spec_)),
      merges_(spec_.merges.size()),
      pretokenizer_(spec_.pretokenize),
      word_character_(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}])") {
  vocab_size_ = static_cast<int32_t>(spec_.vocab.size());
  for (const AddedToken& token : spec_.added_tokens) {
    vocab_size_ = std::max(vocab_size_, token.id + 1);
  }
  bytes_.resize(vocab_size_);
  special_.resize(vocab_size_);
  for (size_t id = 0; id < spec_.vocab.size(); ++id) {
    const std::string& text = spec_.vocab[id];
    if (text.empty()) continue;
    const std::optional<std::string> bytes = BytesOfToken(text);
    bytes_[id] = bytes.value_or(text);
    if (spec_.ignore_merges && bytes) id_of_bytes_.emplace(*bytes, id);
    id_of_text_.emplace(text, id);
  }
  for (size_t rank = 0; rank < spec_.merges.size(); ++rank) {
    const auto [left, right] = spec_.merges[rank];
    merges_.Insert(left, right, static_cast<int32_t>(rank),
                   id_of_text_.at(spec_.vocab[left] + spec_.vocab[right]));
  }
  for (size_t i = 0; i < spec_.added_tokens.size(); ++i) {
    const AddedToken& token = spec_.added_tokens[i];
    (token.normalized ? normalized_finder_ : raw_finder_).Add(token, static_cast<int32_t>(i));
    bytes_[token.id] = token.content;
    special_[token.id] = token.special;
    id_of_text_.insert_or_assign(token.content, token.id);
  }
}

BpeTokenizer::~BpeTokenizer() = default;

std::unique_ptr<BpeTokenizer::Scratch> BpeTokenizer::AcquireScratch() const {
  {
    std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      std::unique_ptr<Scratch> scratch = std::move(free_.back());
      free_.pop_back();
      return scratch;
    }
  }
  return std::make_unique<Scratch>();
}

std::vector<int32_t> BpeTokenizer::EncodeText(std::string_view text,
                                              const EncodeOptions& options) const {
  std::unique_ptr<Scratch> scratch = AcquireScratch();
  Call call{options, *scratch, {}};
  call.ids.reserve(text.size() / 4 + 8);
  if (options.add_special_tokens) call.ids = spec_.prefix_ids;
  while (!text.empty()) {
    const size_t valid = ValidUtf8Prefix(text);
    if (valid > 0) EncodePiece(text.substr(0, valid), raw_finder_, false, call);
    text.remove_prefix(valid);
    size_t invalid = 0;
    while (invalid < text.size()) {
      const Utf8Head head = ReadUtf8Head(text.substr(invalid));
      if (head.kind == Utf8Kind::kValid) break;
      invalid += head.length;
    }
    AppendBytes(text.substr(0, invalid), &call.ids);
    text.remove_prefix(invalid);
  }
  if (options.add_special_tokens) {
    call.ids.insert(call.ids.end(), spec_.suffix_ids.begin(), spec_.suffix_ids.end());
  }
  std::lock_guard lock(mutex_);
  free_.push_back(std::move(scratch));
  return std::move(call.ids);
}

// Tokens that are not normalized are found first, the normalized ones in what is between them.
void BpeTokenizer::EncodePiece(std::string_view text, const AddedTokenFinder& finder, bool last,
                               Call& call) const {
  const auto plain = [&](size_t begin, size_t end) {
    if (begin >= end) return;
    const std::string_view piece = text.substr(begin, end - begin);
    if (!last) return EncodePiece(piece, normalized_finder_, true, call);
    pretokenizer_.Split(piece, &call.scratch.regex,
                        [&](std::string_view word) { EncodeWord(word, call); });
  };
  size_t done = 0;
  AddedTokenFinder::Match match;
  for (size_t at = 0; finder.Find(text, at, &match); at = match.end) {
    const AddedToken& token = spec_.added_tokens[match.idx];
    if (token.special && !call.options.parse_special) continue;
    if (token.single_word && !StandsAlone(text, match.begin, match.end, call.scratch)) continue;
    size_t begin = match.begin, end = match.end;
    if (token.lstrip) begin = std::max(TrailingSpace(text.substr(0, begin)), done);
    if (token.rstrip) end = SkipSpace(text, end);
    plain(done, begin);
    call.ids.push_back(token.id);
    done = end;
  }
  plain(done, text.size());
}

bool BpeTokenizer::StandsAlone(std::string_view text, size_t begin, size_t end,
                               Scratch& scratch) const {
  const auto is_word = [&](size_t at) {
    const std::string_view character = text.substr(at, ReadUtf8Head(text.substr(at)).length);
    Regex::Match match;
    return word_character_.Find(character, 0, &scratch.regex, &match);
  };
  if (begin > 0) {
    size_t before = begin - 1;
    while ((text[before] & 0xC0) == 0x80) --before;
    if (is_word(before)) return false;
  }
  return end == text.size() || !is_word(end);
}

void BpeTokenizer::EncodeWord(std::string_view word, Call& call) const {
  WordCache::Slot* slot = call.scratch.cache.Find(word);
  if (slot != nullptr && WordCache::Holds(*slot, word)) {
    call.ids.insert(call.ids.end(), slot->ids, slot->ids + slot->num_ids);
    return;
  }
  MergeWord(word, call.scratch);
  const std::vector<int32_t>& ids = call.scratch.word;
  call.ids.insert(call.ids.end(), ids.begin(), ids.end());
  if (slot != nullptr) WordCache::Store(word, ids, slot);
}

void BpeTokenizer::AppendBytes(std::string_view bytes, std::vector<int32_t>* ids) const {
  bool after_unk = false;
  for (const char c : bytes) {
    const int32_t id = byte_id_[static_cast<uint8_t>(c)];
    if (id >= 0) {
      ids->push_back(id);
    } else if (spec_.unk_id && !(after_unk && spec_.fuse_unk)) {
      ids->push_back(*spec_.unk_id);
    }
    after_unk = id < 0;
  }
}

void BpeTokenizer::MergeWord(std::string_view word, Scratch& scratch) const {
  std::vector<int32_t>& ids = scratch.word;
  ids.clear();
  if (word.size() > kMaxWordBytes) {
    Fail("data.tokenizer", "a pre-token of {} bytes: at most {} are encoded", word.size(),
         kMaxWordBytes);
  }
  if (spec_.ignore_merges) {
    if (const auto it = id_of_bytes_.find(std::string(word)); it != id_of_bytes_.end()) {
      ids.push_back(it->second);
      return;
    }
  }
  AppendBytes(word, &ids);
  if (ids.size() <= kShortWord) {
    MergeShort(&ids);
  } else {
    MergeLong(&ids);
  }
}

// The pair of lowest rank merges first, of equal ones the leftmost.
void BpeTokenizer::MergeShort(std::vector<int32_t>* ids) const {
  const MergeTable::Entry* pairs[kShortWord];
  int n = static_cast<int>(ids->size());
  int32_t* id = ids->data();
  for (int i = 0; i + 1 < n; ++i) pairs[i] = merges_.Find(id[i], id[i + 1]);
  while (true) {
    int best = -1;
    for (int i = 0; i + 1 < n; ++i) {
      if (pairs[i] != nullptr && (best < 0 || pairs[i]->rank < pairs[best]->rank)) best = i;
    }
    if (best < 0) break;
    id[best] = pairs[best]->id;
    std::copy(id + best + 2, id + n, id + best + 1);
    if (best + 2 < n) std::copy(pairs + best + 2, pairs + n - 1, pairs + best + 1);
    --n;
    if (best > 0) pairs[best - 1] = merges_.Find(id[best - 1], id[best]);
    if (best + 1 < n) pairs[best] = merges_.Find(id[best], id[best + 1]);
  }
  ids->resize(n);
}

void BpeTokenizer::MergeLong(std::vector<int32_t>* ids) const {
  struct Candidate {
    int32_t rank, at, id;
    bool operator<(const Candidate& other) const {  // the queue's top is its greatest
      return std::pair(rank, at) > std::pair(other.rank, other.at);
    }
  };
  const int32_t n = static_cast<int32_t>(ids->size());
  std::vector<int32_t>& id = *ids;  // -1: merged into the symbol before
  std::vector<int32_t> next(n), previous(n);
  std::priority_queue<Candidate> queue;
  const auto offer = [&](int32_t left, int32_t right) {
    if (const MergeTable::Entry* entry = merges_.Find(id[left], id[right])) {
      queue.push({entry->rank, left, entry->id});
    }
  };
  for (int32_t i = 0; i < n; ++i) {
    previous[i] = i - 1;
    next[i] = i + 1;
    if (i + 1 < n) offer(i, i + 1);
  }
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    const int32_t left = top.at;
    if (id[left] < 0 || next[left] == n) continue;
    const int32_t right = next[left];
    const MergeTable::Entry* entry = merges_.Find(id[left], id[right]);
    if (entry == nullptr || entry->id != top.id) continue;  // its symbols have changed
    id[left] = top.id;
    id[right] = -1;
    next[left] = next[right];
    if (next[left] < n) previous[next[left]] = left;
    if (previous[left] >= 0) offer(previous[left], left);
    if (next[left] < n) offer(left, next[left]);
  }
  std::erase(id, -1);
}

std::string BpeTokenizer::DecodeToken(int32_t id) const {
  CheckId(id);
  return bytes_[id];
}

std::string BpeTokenizer::TokenText(int32_t id) const {
  CheckId(id);
  return id < static_cast<int32_t>(spec_.vocab.size()) && !spec_.vocab[id].empty() ? spec_.vocab[id]
                                                                                   : bytes_[id];
}

std::optional<int32_t> BpeTokenizer::TokenId(std::string_view text) const {
  const auto it = id_of_text_.find(std::string(text));
  if (it == id_of_text_.end()) return std::nullopt;
  return it->second;
}

bool BpeTokenizer::IsSpecial(int32_t id) const {
  CheckId(id);
  return special_[id];
}

}  // namespace detour::data
