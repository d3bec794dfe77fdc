// Messages -> token ids, through a model's chat template and tokenizer.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/json.h"
#include "data/chat_template.h"
#include "data/tokenizer.h"

namespace detour::data {

/// The ids are those of the rendered text, as transformers' apply_chat_template gives them, unless
/// a message holds the text of a special token: there the token would end the message or open
/// another one. Such text is encoded as ordinary text instead. To keep it apart from the same text
/// of the template, each occurrence is one private-use character while the template runs.
///
/// Added tokens that are not marked special ("<think>") are recognised everywhere.
/// Const methods are thread-safe.
class ChatEncoder {
 public:
  /// Both must outlive this.
  ChatEncoder(const Tokenizer& tokenizer, const ChatTemplate& chat);

  /// Error("data.chat") for text that can't be kept apart, else what ChatTemplate::Render says.
  std::vector<int32_t> Encode(const Json& messages, bool add_generation_prompt) const;

  /// The token that the template puts behind a message of the assistant, if it is one token.
  std::optional<int32_t> EndOfTurn() const;

 private:
  struct Special {
    std::string text;
    int32_t id;
    bool parsed;  // by the tokenizer itself; SentencePiece leaves that to its caller
  };
  const Special* Find(std::string_view text, size_t at) const;
  bool HasSpecial(std::string_view text) const;
  std::string Disguise(const std::string& text, char32_t base) const;
  void DisguiseAll(Json& value, char32_t base) const;
  std::vector<int32_t> EncodeRendered(std::string_view text, char32_t base) const;

  const Tokenizer& tokenizer_;
  const ChatTemplate& chat_;
  std::vector<Special> specials_;  // the longest first
};

}  // namespace detour::data
