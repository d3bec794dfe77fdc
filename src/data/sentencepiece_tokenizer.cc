#include <sentencepiece_processor.h>

#include "core/error.h"
#include "data/tokenizer.h"
#include "data/utf8.h"

namespace detour::data {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, which stands for ' '

// A protobuf appended to another overwrites the fields it has: normalizer_spec (3) with
// add_dummy_prefix (3) false.
constexpr std::string_view kNoDummyPrefix("\x1A\x02\x18\x00", 4);

/// SentencePiece by libsentencepiece. Text that is not UTF-8: with byte pieces each byte of an
/// invalid run is its byte piece and the text behind it gets no prefix space; without them the
/// library puts U+FFFD. What its normalizer changes (NFKC, extra spaces) does not come back.
class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string_view model, const std::string& name) {
    Load(model, name, &processor_);
    Load(std::string(model).append(kNoDummyPrefix), name, &continuation_);
    vocab_size_ = processor_.GetPieceSize();
    const auto id = [](int value) {
      return value < 0 ? std::nullopt : std::optional<int32_t>(value);
    };
    bos_id_ = id(processor_.bos_id());
    eos_id_ = id(processor_.eos_id());
    pad_id_ = id(processor_.pad_id());
    for (int i = 0; i < vocab_size_; ++i) {
      if (processor_.IsByte(i)) byte_ids_.push_back(i);
    }
    if (byte_ids_.size() != 256) byte_ids_.clear();
    const std::vector<std::string> pieces = processor_.EncodeAsPieces("a");
    dummy_prefix_ = !pieces.empty() && pieces[0].starts_with(kSpace);
  }

  std::string DecodeToken(int32_t id) const override {
    CheckId(id);
    if (processor_.IsControl(id)) return "";
    if (processor_.IsByte(id)) {  // "<0xNN>"
      return std::string(
          1, static_cast<char>(std::stoi(processor_.IdToPiece(id).substr(3), nullptr, 16)));
    }
    if (processor_.IsUnknown(id)) return processor_.DecodeIds({id});
    std::string text;
    std::string_view piece = processor_.IdToPiece(id);
    for (size_t at; (at = piece.find(kSpace)) != std::string_view::npos;) {
      text.append(piece.substr(0, at)).append(" ");
      piece.remove_prefix(at + kSpace.size());
    }
    return text.append(piece);
  }

  std::string TokenText(int32_t id) const override {
    CheckId(id);
    return processor_.IdToPiece(id);
  }
  std::optional<int32_t> TokenId(std::string_view text) const override {
    const int id = processor_.PieceToId(text);
    if (processor_.IdToPiece(id) != text) return std::nullopt;
    return id;
  }
  bool IsSpecial(int32_t id) const override {
    CheckId(id);
    return processor_.IsControl(id);
  }

 protected:
  std::vector<int32_t> EncodeText(std::string_view text,
                                  const EncodeOptions& options) const override {
    std::vector<int32_t> ids;
    if (options.add_special_tokens && add_bos_.value_or(true) && bos_id_) ids.push_back(*bos_id_);
    const sentencepiece::SentencePieceProcessor* processor = &processor_;
    while (!text.empty()) {
      size_t valid = byte_ids_.empty() ? text.size() : ValidUtf8Prefix(text);
      if (valid > 0) {
        const std::vector<int> part = processor->EncodeAsIds(text.substr(0, valid));
        ids.insert(ids.end(), part.begin(), part.end());
      }
      for (; valid < text.size(); ++valid) {
        if (ReadUtf8Head(text.substr(valid)).kind == Utf8Kind::kValid) break;
        ids.push_back(byte_ids_[static_cast<uint8_t>(text[valid])]);
      }
      text.remove_prefix(valid);
      processor = &continuation_;
    }
    if (options.add_special_tokens && add_eos_.value_or(false) && eos_id_) ids.push_back(*eos_id_);
    return ids;
  }

  std::string DecodeIds(std::span<const int32_t> ids, bool skip_special) const override {
    std::string text;
    bool first = dummy_prefix_;
    for (const int32_t id : ids) {
      if (IsSpecial(id)) {
        if (!skip_special) text += DecodeToken(id);
        continue;
      }
      const std::string piece = DecodeToken(id);
      text += std::string_view(piece).substr(first && piece.starts_with(' ') ? 1 : 0);
      first = false;
    }
    return text;
  }

 private:
  static void Load(std::string_view model, const std::string& name,
                   sentencepiece::SentencePieceProcessor* processor) {
    if (!processor->LoadFromSerializedProto(model).ok()) {
      Fail("data.tokenizer",
           "{}: not a SentencePiece model, or a damaged one. Hint: a tokenizer.model of Llama 3 is "
           "another format; take its tokenizer.json",
           name);
    }
  }

  sentencepiece::SentencePieceProcessor processor_;
  sentencepiece::SentencePieceProcessor continuation_;  // without the space before a text
  std::vector<int> byte_ids_;                           // by byte; empty without byte pieces
  bool dummy_prefix_ = false;
};

}  // namespace

std::unique_ptr<Tokenizer> LoadSentencePiece(std::string_view model, const std::string& name) {
  return std::make_unique<SentencePieceTokenizer>(model, name);
}

}  // namespace detour::data
