#include "data/bpe_tokenizer.h"

#include <algorithm>

#include "core/error.h"
#include "core/json.h"

namespace detour::data {

struct BpeTokenizer::Scratch {
  Regex::Scratch regex;
  BpeModel::Scratch model;
};

/// One call of Encode.
struct BpeTokenizer::Call {
  const EncodeOptions& options;
  Scratch& scratch;
  std::vector<int32_t> ids;
};

BpeTokenizer::BpeTokenizer(BpeSpec spec)
    : spec_(std::move(spec)),
      model_(spec_),
      normalizer_(spec_.normalize),
      pretokenizer_(spec_.pretokenize),
      decoder_(spec_.decode) {
  bos_id_ = spec_.bos_id;
  eos_id_ = spec_.eos_id;
  pad_id_ = spec_.pad_id;
  vocab_size_ = static_cast<int32_t>(spec_.vocab.size());
  for (const AddedToken& token : spec_.added_tokens) {
    vocab_size_ = std::max(vocab_size_, token.id + 1);
  }
  bytes_.resize(vocab_size_);
  special_.resize(vocab_size_);
  if (!decoder_.Concatenates()) text_.resize(vocab_size_);
  for (size_t id = 0; id < spec_.vocab.size(); ++id) {
    const std::string& token = spec_.vocab[id];
    if (token.empty()) continue;
    bytes_[id] = decoder_.Token(token);
    if (!text_.empty()) text_[id] = token;
  }
  AddTokens();
}

void BpeTokenizer::AddTokens() {
  Regex::Scratch scratch;
  const bool writes_bytes = std::any_of(
      spec_.normalize.begin(), spec_.normalize.end(),
      [](const NormalizeStep& step) { return step.kind == NormalizeStep::Kind::kByteLevel; });
  for (size_t i = 0; i < spec_.added_tokens.size(); ++i) {
    const AddedToken& token = spec_.added_tokens[i];
    std::string content = token.content;
    PieceStart start;
    if (token.normalized) content = normalizer_.Run(content, &start, &scratch);
    AddedTokenFinder& finder = token.normalized ? normalized_finder_ : raw_finder_;
    if (content.empty() || !finder.Add(content, static_cast<int32_t>(i))) {
      Fail("data.tokenizer", "added token \"{}\": {} once it is normalized",
           Printable(token.content), content.empty() ? "nothing is left" : "the same as another");
    }
    // ByteLevel would take some characters for bytes, which only its own normalizer makes of them.
    bytes_[token.id] = decoder_.IsByteLevel() && !writes_bytes ? content : decoder_.Token(content);
    if (!text_.empty()) text_[token.id] = content;
    special_[token.id] = token.special;
    id_of_added_.insert_or_assign(token.content, token.id);
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
  for (bool first = true; !text.empty(); first = false) {
    const size_t valid = ValidUtf8Prefix(text);
    if (valid > 0) {
      const size_t of_first = first ? ReadUtf8Head(text).length : 0;
      EncodeRun(text.substr(0, valid), {of_first, !first}, call);
    }
    text.remove_prefix(valid);
    size_t invalid = 0;
    while (invalid < text.size()) {
      const Utf8Head head = ReadUtf8Head(text.substr(invalid));
      if (head.kind == Utf8Kind::kValid) break;
      invalid += head.length;
    }
    model_.EncodeBytes(text.substr(0, invalid), &call.ids);
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
void BpeTokenizer::EncodeRun(std::string_view run, PieceStart start, Call& call) const {
  SplitAtAddedTokens(
      run, raw_finder_, spec_.added_tokens, call.options.parse_special,
      [&](size_t begin, size_t end) {
        EncodePiece(run.substr(begin, end - begin), start.Part(begin), call);
      },
      [&](const AddedToken& token) { call.ids.push_back(token.id); });
}

void BpeTokenizer::EncodePiece(std::string_view piece, PieceStart start, Call& call) const {
  std::string normalized;
  if (!normalizer_.empty()) {
    normalized = normalizer_.Run(piece, &start, &call.scratch.regex);
    piece = normalized;
  }
  if (normalized_finder_.empty()) return EncodeNormalized(piece, start, call);
  SplitAtAddedTokens(
      piece, normalized_finder_, spec_.added_tokens, call.options.parse_special,
      [&](size_t begin, size_t end) {
        EncodeNormalized(piece.substr(begin, end - begin), start.Part(begin), call);
      },
      [&](const AddedToken& token) { call.ids.push_back(token.id); });
}

void BpeTokenizer::EncodeNormalized(std::string_view piece, PieceStart start, Call& call) const {
  if (piece.empty()) return;
  pretokenizer_.Split(piece, start, &call.scratch.regex, [&](std::string_view word) {
    model_.Encode(word, &call.scratch.model, &call.ids);
  });
}

std::string BpeTokenizer::DecodeToken(int32_t id) const {
  CheckId(id);
  return bytes_[id];
}

std::string BpeTokenizer::DecodeIds(std::span<const int32_t> ids, bool skip_special) const {
  std::string text;
  std::vector<std::string> tokens;
  for (const int32_t id : ids) {
    CheckId(id);
    if (skip_special && special_[id]) continue;
    if (text_.empty()) {
      text += bytes_[id];
    } else {
      tokens.push_back(text_[id]);
    }
  }
  return text_.empty() ? decoder_.Finish(std::move(text)) : decoder_.Decode(std::move(tokens));
}

std::string BpeTokenizer::TokenText(int32_t id) const {
  CheckId(id);
  return id < static_cast<int32_t>(spec_.vocab.size()) && !spec_.vocab[id].empty() ? spec_.vocab[id]
                                                                                   : bytes_[id];
}

std::optional<int32_t> BpeTokenizer::TokenId(std::string_view text) const {
  const std::string key(text);
  const auto it = id_of_added_.find(key);
  return it == id_of_added_.end() ? model_.TokenId(key) : it->second;
}

bool BpeTokenizer::IsSpecial(int32_t id) const {
  CheckId(id);
  return special_[id];
}

}  // namespace detour::data
