#include "data/bpe_model.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <queue>

#include "core/error.h"
#include "data/unicode.h"

namespace detour::data {
namespace {

// Above this many symbols a heap finds the next merge, so that long words take n log n.
constexpr size_t kShortWord = 48;
// A pre-token beyond this would take gigabytes to merge; those of real data are far below.
constexpr size_t kMaxWordBytes = size_t{1} << 28;
constexpr std::string_view kMark = "\xE2\x96\x81";  // U+2581, SentencePiece's space

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

}  // namespace

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

struct BpeModel::Scratch::Impl {
  WordCache cache;
  std::vector<int32_t> word;
};

BpeModel::Scratch::Scratch() : impl_(std::make_unique<Impl>()) {}
BpeModel::Scratch::~Scratch() = default;

BpeModel::BpeModel(const BpeSpec& spec)
    : byte_level_(spec.byte_level),
      ignore_merges_(spec.ignore_merges),
      fuse_unk_(spec.fuse_unk),
      byte_fallback_(spec.byte_fallback),
      prefix_(spec.continuing_subword_prefix),
      suffix_(spec.end_of_word_suffix),
      unk_id_(spec.unk_id.value_or(-1)),
      merges_(spec.merges.size()) {
  ascii_id_.fill(-1);
  for (size_t i = 0; i < spec.vocab.size(); ++i) {
    const std::string& token = spec.vocab[i];
    const int32_t id = static_cast<int32_t>(i);
    if (token.empty() || !id_of_token_.emplace(token, id).second) continue;
    if (ignore_merges_) {
      const auto word = byte_level_ ? BytesOfToken(token) : std::optional<std::string>(token);
      if (word) id_of_word_.emplace(*word, id);
    }
    if (const int length = ReadUtf8Head(token).length; length == static_cast<int>(token.size())) {
      const uint32_t c = DecodeUtf8(token, length);
      if (c < ascii_id_.size()) ascii_id_[c] = id;
      character_id_.emplace(c, id);
    }
  }
  for (int b = 0; b < 256; ++b) {
    byte_id_[b] =
        TokenId(byte_level_ ? ByteCharacters()[b] : fmt::format("<0x{:02X}>", b)).value_or(-1);
  }
  for (size_t i = 0; i < spec.merges.size(); ++i) {
    const auto [left, right] = spec.merges[i];
    const auto merged = MergedToken(spec, spec.vocab[left], spec.vocab[right]);
    merges_.Insert(left, right,
                   spec.merge_ranks.empty() ? static_cast<int32_t>(i) : spec.merge_ranks[i],
                   id_of_token_.at(merged.value()));
  }
  cut_at_marks_ = MayCutAtMarks(spec);
}

// A pipeline without pre-tokenizer gives the whole text as one word. A merge over the place between
// another character and a mark joins a token that ends so with one that begins so.
bool BpeModel::MayCutAtMarks(const BpeSpec& spec) const {
  if (byte_level_ || ignore_merges_ || !prefix_.empty() || !suffix_.empty()) return false;
  if (!id_of_token_.contains(std::string(kMark))) return false;
  return std::none_of(spec.merges.begin(), spec.merges.end(), [&](const auto& merge) {
    return spec.vocab[merge.second].starts_with(kMark) &&
           (!spec.vocab[merge.first].ends_with(kMark) || merge.first == unk_id_);
  });
}

std::optional<int32_t> BpeModel::TokenId(const std::string& token) const {
  const auto it = id_of_token_.find(token);
  return it == id_of_token_.end() ? std::nullopt : std::optional<int32_t>(it->second);
}

void BpeModel::Encode(std::string_view word, Scratch* scratch, std::vector<int32_t>* ids) const {
  if (!cut_at_marks_) return EncodePart(word, scratch, ids);
  size_t begin = 0;
  for (size_t at = 0; (at = word.find(kMark, at)) != std::string_view::npos; at += kMark.size()) {
    if (at == begin || word.substr(0, at).ends_with(kMark)) continue;
    EncodePart(word.substr(begin, at - begin), scratch, ids);
    begin = at;
  }
  EncodePart(word.substr(begin), scratch, ids);
}

void BpeModel::EncodePart(std::string_view word, Scratch* scratch,
                          std::vector<int32_t>* ids) const {
  WordCache::Slot* slot = scratch->impl_->cache.Find(word);
  if (slot != nullptr && WordCache::Holds(*slot, word)) {
    ids->insert(ids->end(), slot->ids, slot->ids + slot->num_ids);
    return;
  }
  std::vector<int32_t>& now = scratch->impl_->word;
  Merge(word, &now);
  ids->insert(ids->end(), now.begin(), now.end());
  if (slot != nullptr) WordCache::Store(word, now, slot);
}

void BpeModel::EncodeBytes(std::string_view bytes, std::vector<int32_t>* ids) const {
  bool after_unk = false;
  for (const char c : bytes) {
    const int32_t id = byte_level_ || byte_fallback_ ? byte_id_[static_cast<uint8_t>(c)] : -1;
    if (id >= 0) {
      ids->push_back(id);
    } else if (unk_id_ >= 0 && !(after_unk && fuse_unk_)) {
      ids->push_back(unk_id_);
    }
    after_unk = id < 0;
  }
}

void BpeModel::Merge(std::string_view word, std::vector<int32_t>* ids) const {
  ids->clear();
  if (word.size() > kMaxWordBytes) {
    Fail("data.tokenizer", "a pre-token of {} bytes: at most {} are encoded", word.size(),
         kMaxWordBytes);
  }
  if (ignore_merges_) {
    if (const auto it = id_of_word_.find(std::string(word)); it != id_of_word_.end()) {
      ids->push_back(it->second);
      return;
    }
  }
  if (byte_level_) {
    EncodeBytes(word, ids);
  } else {
    Symbols(word, ids);
  }
  if (ids->size() <= kShortWord) {
    MergeShort(ids);
  } else {
    MergeLong(ids);
  }
}

// An unknown token waits until a known character or the end comes, also while bytes go out: so
// does that of `tokenizers`.
void BpeModel::Symbols(std::string_view word, std::vector<int32_t>* ids) const {
  bool unk = false;
  std::string affixed;
  ForEachCharacter(word, [&](uint32_t c, size_t begin, size_t end) {
    std::string_view text = word.substr(begin, end - begin);
    if (!prefix_.empty() || !suffix_.empty()) {
      affixed.assign(begin > 0 ? prefix_ : "").append(text);
      if (end == word.size()) affixed += suffix_;
      text = affixed;
    }
    const int32_t id = CharacterId(c, text);
    if (id >= 0) {
      if (unk) ids->push_back(unk_id_);
      unk = false;
      ids->push_back(id);
    } else if (!(byte_fallback_ && FallBack(text, ids)) && unk_id_ >= 0) {
      if (unk && !fuse_unk_) ids->push_back(unk_id_);
      unk = true;
    }
  });
  if (unk) ids->push_back(unk_id_);
}

int32_t BpeModel::CharacterId(uint32_t c, std::string_view text) const {
  if (!prefix_.empty() || !suffix_.empty()) return TokenId(std::string(text)).value_or(-1);
  if (c < ascii_id_.size()) return ascii_id_[c];
  const auto it = character_id_.find(c);
  return it == character_id_.end() ? -1 : it->second;
}

bool BpeModel::FallBack(std::string_view text, std::vector<int32_t>* ids) const {
  const auto id = [&](char c) { return byte_id_[static_cast<uint8_t>(c)]; };
  if (std::any_of(text.begin(), text.end(), [&](char c) { return id(c) < 0; })) return false;
  for (const char c : text) ids->push_back(id(c));
  return true;
}

// The pair of lowest rank merges first, of equal ones the leftmost.
void BpeModel::MergeShort(std::vector<int32_t>* ids) const {
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

void BpeModel::MergeLong(std::vector<int32_t>* ids) const {
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

}  // namespace detour::data
