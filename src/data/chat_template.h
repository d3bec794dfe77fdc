// The chat template of a model: messages -> the text that the model reads.
#pragma once

#include <ctime>
#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "core/json.h"
#include "data/jinja.h"

namespace detour::data {

struct ChatOptions {
  /// End with what opens the assistant's next message.
  bool add_generation_prompt = false;
  /// More variables for the template ("tools", "documents", "enable_thinking", …); they win over
  /// the special tokens.
  Json variables = Json::object();
  /// Of a model with several templates: this one. Empty: "tool_use" if there are tools, else
  /// "default".
  std::string template_name;
  jinja::Limits limits;
  /// For strftime_now; absent: the local time of now.
  std::function<std::tm()> clock;
};

/// The templates of a model's directory by their names, and where they stand (for messages). Looked
/// for where transformers does: chat_template.jinja (and additional_chat_templates/NAME.jinja),
/// else "chat_template" of tokenizer_config.json, one text or a list of named ones.
struct ChatTemplateTexts {
  std::map<std::string, std::string> texts;
  std::string where;
};
ChatTemplateTexts ReadChatTemplates(const std::string& directory);

/// Const methods are thread-safe. Error("data.jinja") for what a template gets wrong,
/// Error("data.chat_template") and Error("json") for files and messages.
class ChatTemplate {
 public:
  /// The templates of a model's directory (ReadChatTemplates). Where there is none: ChatML. The
  /// special tokens are those that tokenizer_config.json names (special_tokens_map.json where it
  /// does not).
  static ChatTemplate Load(const std::string& directory);

  /// A template from elsewhere (a GGUF's, a user's file). `special_tokens`: "bos_token" -> "<s>"
  /// and so on. `name` is for messages.
  static ChatTemplate FromText(std::string_view text,
                               std::map<std::string, std::string> special_tokens,
                               const std::string& name = "chat template");

  /// ChatML: "<|im_start|>ROLE\nCONTENT<|im_end|>\n" for each message.
  static std::string_view DefaultText();

  /// `messages`: a list of {"role", "content"} with whatever else the template reads. The text is
  /// for a tokenizer that adds no special tokens of its own.
  std::string Render(const Json& messages, const ChatOptions& options = {}) const;

  /// Whether the model brought a template; if not, this is the default.
  bool from_model() const { return from_model_; }
  const std::map<std::string, std::string>& special_tokens() const { return special_tokens_; }

 private:
  std::map<std::string, jinja::Template> templates_;  // by name
  std::map<std::string, std::string> special_tokens_;
  bool from_model_ = true;
};

}  // namespace detour::data
