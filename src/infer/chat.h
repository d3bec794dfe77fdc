// A conversation with a model: its history, and one answer after the other.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "core/json.h"
#include "data/chat_encoder.h"
#include "infer/prefix.h"
#include "infer/sampler.h"
#include "infer/sequence.h"
#include "model/model.h"

namespace detour::infer {

struct ConversationOptions {
  SamplingOptions sampling;
  int64_t max_new_tokens = 1024;
  int64_t prefill_chunk = 512;
  /// Each ends an answer; so does the token that the template puts behind one.
  std::vector<int32_t> eos_ids;
  std::vector<std::string> stop;  ///< texts that end an answer; no empty ones
  bool reuse_cache = true;        ///< false: every answer from an empty cache; changes no token
};

struct Reply {
  std::string text;             ///< as it stands in the history: no special tokens
  std::vector<int32_t> prompt;  ///< the conversation up to here
  std::vector<int32_t> tokens;  ///< of the answer, without the one that ended it
  std::string finish_reason;    ///< "eos", "length", "context", "stopped"
  int64_t num_dropped = 0;      ///< messages that left the history to make room
  int64_t num_reused = 0;       ///< tokens of the prompt that were in the cache
  int64_t prefill_tokens = 0;   ///< run before the first token of the answer
  int64_t decode_tokens = 0;    ///< run after it
  double prefill_seconds = 0, decode_seconds = 0;
  Attendance attendance;  ///< of the tokens run
  int64_t kv_bytes = 0;   ///< after the answer
};

/// Not thread-safe.
class Conversation {
 public:
  /// All three must outlive this. Error("generate.options") for options out of range,
  /// Error("chat.tokenizer") for a tokenizer with more tokens than the model.
  Conversation(const model::Model& model, const data::Tokenizer& tokenizer,
               const data::ChatTemplate& chat, ConversationOptions options);

  /// The system message that stands before all others; empty: none. An Error, and the old one
  /// stays, if the template refuses it.
  void SetSystem(const std::string& text);
  /// Forgets all messages but the system's.
  void Reset() { messages_ = Json::array(); }
  /// Those of user and assistant, in turns.
  const Json& messages() const { return messages_; }

  /// Called after each pass with the text that is new, possibly none; false stops the answer.
  using OnText = std::function<bool(std::string_view text)>;
  /// Answers a message (any bytes; what is not UTF-8 becomes U+FFFD). Both join the history, also
  /// if the answer was stopped. Where the conversation leaves no room for max_new_tokens (or, in a
  /// short context, half of it), the oldest pairs of messages leave. An Error (the template's, or
  /// "chat.length" for a message that does not fit by itself) leaves all as it was.
  Reply Say(std::string_view text, const OnText& on_text);

 private:
  std::vector<int32_t> Encode(const Json& messages, const std::string& system) const;
  std::vector<int32_t> Fit(Json* messages, int64_t* num_dropped) const;
  void Answer(const OnText& on_text, Reply* reply);
  std::string TextOf(int32_t token, bool first) const;

  const model::Model& model_;
  const data::Tokenizer& tokenizer_;
  const data::ChatEncoder encoder_;
  ConversationOptions options_;
  std::string system_;
  Json messages_ = Json::array();
  PrefixCache cache_;
};

}  // namespace detour::infer
