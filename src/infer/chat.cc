#include "infer/chat.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "data/utf8_stream.h"
#include "infer/answer_text.h"
#include "report/status.h"

namespace detour::infer {

Conversation::Conversation(const model::Model& model, const data::Tokenizer& tokenizer,
                           const data::ChatTemplate& chat, ConversationOptions options)
    : model_(model),
      tokenizer_(tokenizer),
      encoder_(tokenizer, chat),
      options_(std::move(options)),
      cache_(model, options_.prefill_chunk) {
  CheckSamplingOptions(options_.sampling);
  for (const std::string& s : options_.stop) {
    if (s.empty()) Fail("generate.options", "--stop: expected a string, got an empty one");
  }
  if (tokenizer.vocab_size() > model.config.vocab_size) {
    Fail("chat.tokenizer", "the tokenizer has {} tokens, the model {}", tokenizer.vocab_size(),
         model.config.vocab_size);
  }
  if (const auto id = encoder_.EndOfTurn()) options_.eos_ids.push_back(*id);
}

std::vector<int32_t> Conversation::Encode(const Json& messages, const std::string& system) const {
  Json all = Json::array();
  if (!system.empty()) all.push_back({{"role", "system"}, {"content", system}});
  all.insert(all.end(), messages.begin(), messages.end());
  return encoder_.Encode(all, /*add_generation_prompt=*/true);
}

void Conversation::SetSystem(const std::string& text) {
  data::Utf8Stream utf8;
  std::string system = utf8.Push(text);
  system += utf8.Flush();
  Json trial = messages_;
  trial.push_back({{"role", "user"}, {"content", "Hello"}});
  Encode(trial, system);
  system_ = std::move(system);
}

/// The ids of the newest messages that leave room for an answer; the others leave `messages`.
std::vector<int32_t> Conversation::Fit(Json* messages, int64_t* num_dropped) const {
  const int64_t context = model_.config.max_position_embeddings;
  const int64_t room =
      std::clamp<int64_t>(options_.max_new_tokens, 1, std::max<int64_t>(1, context / 2));
  while (true) {
    std::vector<int32_t> ids = Encode(*messages, system_);
    const auto length = std::ssize(ids);
    if (ids.empty()) Fail("chat.template", "the chat template makes no text of the messages");
    if (length + room <= context) return ids;
    if (messages->size() == 1) {
      if (length < context) return ids;
      Fail("chat.length",
           "the message makes {} tokens; the model's context of {} has no room for it", length,
           context);
    }
    messages->erase(messages->begin(), messages->begin() + 2);
    *num_dropped += 2;
  }
}

/// What a token adds to the answer's text.
std::string Conversation::TextOf(int32_t token, bool first) const {
  if (token >= tokenizer_.vocab_size() || tokenizer_.IsSpecial(token)) return "";
  return first ? tokenizer_.Decode({&token, 1}) : tokenizer_.DecodeToken(token);
}

void Conversation::Answer(const OnText& on_text, Reply* reply) {
  AnswerText text(&options_.stop);
  bool stopped = false;
  const auto tell = [&](const std::string& more) {
    reply->text += more;
    stopped |= !on_text(more);
    return !stopped && !text.stopped();
  };
  const AnswerLimits limits{options_.max_new_tokens, model_.config.max_position_embeddings,
                            options_.eos_ids};
  std::vector<int32_t> tokens = reply->prompt;
  reply->num_reused = -1;  // not known yet
  while (reply->finish_reason.empty()) {
    const double start = report::MonotonicSeconds();
    const int64_t run = cache_.tokens_run();
    const bool prefill = reply->tokens.empty();
    const at::Tensor logits = cache_.Next(tokens, [&] {
      if (prefill && reply->num_reused < 0) reply->num_reused = cache_.num_tokens();
      return tell("");
    });
    (prefill ? reply->prefill_seconds : reply->decode_seconds) +=
        report::MonotonicSeconds() - start;
    (prefill ? reply->prefill_tokens : reply->decode_tokens) += cache_.tokens_run() - run;
    if (!logits.defined()) {
      reply->finish_reason = "stopped";
      break;
    }
    const int32_t token = Sample({ops::F32(logits), static_cast<size_t>(logits.size(1))}, tokens,
                                 options_.sampling, 0, static_cast<uint32_t>(tokens.size()));
    const auto on_token = [&](int32_t id) {
      return tell(text.Push(TextOf(id, /*first=*/reply->tokens.size() == 1)));
    };
    reply->finish_reason = AppendToken(token, limits, on_token, &tokens, &reply->tokens);
  }
  tell(text.Finish(/*mark_unfinished=*/false));
}

Reply Conversation::Say(std::string_view text, const OnText& on_text) {
  data::Utf8Stream utf8;
  std::string message = utf8.Push(text);
  message += utf8.Flush();
  Json messages = messages_;
  messages.push_back({{"role", "user"}, {"content", std::move(message)}});
  Reply reply;
  reply.prompt = Fit(&messages, &reply.num_dropped);
  if (!options_.reuse_cache) cache_.Clear();
  const int64_t run = cache_.tokens_run();
  std::vector<int64_t> attended = cache_.attended_by_layer();
  Answer(on_text, &reply);
  for (size_t l = 0; l < attended.size(); ++l) {
    attended[l] = cache_.attended_by_layer()[l] - attended[l];
  }
  reply.attendance.Add(model_.config, attended, cache_.tokens_run() - run);
  reply.kv_bytes = cache_.bytes();
  messages.push_back({{"role", "assistant"}, {"content", reply.text}});
  messages_ = std::move(messages);
  return reply;
}

}  // namespace detour::infer
