#include "data/chat_template.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <utility>
#include <vector>

#include "io/atomic.h"

namespace detour::data {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMaxTemplateBytes = int64_t{1} << 20;
constexpr int64_t kMaxConfigBytes = int64_t{64} << 20;
constexpr const char* kSpecialTokens[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                          "pad_token", "cls_token", "mask_token"};

Json ReadConfig(const fs::path& path) {
  if (!fs::exists(path)) return Json::object();
  return ParseJson(io::ReadFile(path.string(), kMaxConfigBytes), path.string());
}

// A token is a string or, in older files, an object that has it as "content".
void ReadTokens(const fs::path& path, std::map<std::string, std::string>* tokens) {
  const Json config = ReadConfig(path);
  for (const char* key : kSpecialTokens) {
    if (tokens->contains(key) || !HasKey(config, key, path.string())) continue;
    (*tokens)[key] = config[key].is_object()
                         ? GetString(config[key], "content", path.string() + ": " + key)
                         : GetString(config, key, path.string());
  }
}

// Name -> text.
std::map<std::string, std::string> ReadFiles(const fs::path& directory) {
  std::map<std::string, std::string> texts;
  if (fs::exists(directory / "chat_template.jinja")) {
    texts["default"] =
        io::ReadFile((directory / "chat_template.jinja").string(), kMaxTemplateBytes);
  }
  const fs::path more = directory / "additional_chat_templates";
  if (!fs::is_directory(more)) return texts;
  for (const auto& entry : fs::directory_iterator(more)) {
    if (entry.path().extension() != ".jinja") continue;
    texts[entry.path().stem().string()] = io::ReadFile(entry.path().string(), kMaxTemplateBytes);
  }
  return texts;
}

std::map<std::string, std::string> ReadFromConfig(const fs::path& path) {
  const Json config = ReadConfig(path);
  if (!HasKey(config, "chat_template", path.string())) return {};
  const Json& value = config["chat_template"];
  if (!value.is_array()) return {{"default", GetString(config, "chat_template", path.string())}};
  std::map<std::string, std::string> texts;
  for (const Json& entry : value) {
    const std::string where = path.string() + ": chat_template";
    texts[GetString(entry, "name", where)] = GetString(entry, "template", where);
  }
  return texts;
}

// As transformers prepares a message: nothing that is null, and its reasoning under the names that
// templates read.
Json Prepare(const Json& message) {
  Json plain = Json::object();
  for (const auto& [key, value] : message.items()) {
    if (!value.is_null()) plain[key] = value;
  }
  for (const char* field : {"reasoning_content", "thinking", "reasoning"}) {
    const auto it = plain.find(field);
    if (it == plain.end()) continue;
    const Json reasoning = *it;
    Json out = Json::object();
    out["thinking"] = reasoning;
    for (const auto& [key, value] : plain.items()) out[key] = value;
    out["reasoning_content"] = reasoning;
    return out;
  }
  return plain;
}

}  // namespace

std::string_view ChatTemplate::DefaultText() {
  return "{% for message in messages %}"
         "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
         "{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
}

ChatTemplate ChatTemplate::FromText(std::string_view text,
                                    std::map<std::string, std::string> special_tokens,
                                    const std::string& name) {
  ChatTemplate out;
  out.templates_.emplace("default", jinja::Template(text, name));
  out.special_tokens_ = std::move(special_tokens);
  return out;
}

ChatTemplateTexts ReadChatTemplates(const std::string& directory) {
  const fs::path root = directory, config = root / "tokenizer_config.json";
  auto texts = ReadFiles(root);
  if (!texts.empty()) return {std::move(texts), (root / "chat_template.jinja").string()};
  return {ReadFromConfig(config), config.string() + ": chat_template"};
}

ChatTemplate ChatTemplate::Load(const std::string& directory) {
  const fs::path root = directory, config = root / "tokenizer_config.json";
  if (!fs::is_directory(root)) {
    Fail("data.chat_template", "{}: not a directory", directory);
  }
  ChatTemplate out;
  auto [texts, where] = ReadChatTemplates(directory);
  if (texts.empty()) {
    out.from_model_ = false;
    texts["default"] = DefaultText();
    where = "the default chat template";
  }
  for (const auto& [name, text] : texts) {
    const std::string full = name == "default" ? where : where + " \"" + Printable(name, 60) + "\"";
    out.templates_.emplace(name, jinja::Template(text, full));
  }
  ReadTokens(config, &out.special_tokens_);
  ReadTokens(root / "special_tokens_map.json", &out.special_tokens_);
  return out;
}

std::string ChatTemplate::Render(const Json& messages, const ChatOptions& options) const {
  if (!messages.is_array() ||
      !std::all_of(messages.begin(), messages.end(), [](const Json& m) { return m.is_object(); })) {
    Fail("data.chat_template",
         "messages: expected a list of objects with \"role\" and \"content\"");
  }
  Json variables = {{"messages", Json::array()},
                    {"tools", nullptr},
                    {"documents", nullptr},
                    {"add_generation_prompt", options.add_generation_prompt}};
  for (const Json& message : messages) variables["messages"].push_back(Prepare(message));
  for (const auto& [name, token] : special_tokens_) variables[name] = token;
  for (const auto& [name, value] : options.variables.items()) variables[name] = value;
  std::string name = options.template_name;
  if (name.empty()) {
    const bool with_tools = !variables["tools"].is_null() && templates_.contains("tool_use");
    name = with_tools ? "tool_use" : "default";
  }
  const auto it = templates_.find(name);
  if (it == templates_.end()) {
    std::vector<std::string> known;
    for (const auto& [other, unused] : templates_) known.push_back(Printable(other, 60));
    Fail("data.chat_template", "no chat template \"{}\". Hint: the model has {}",
         Printable(name, 60), fmt::join(known, ", "));
  }
  return it->second.Render(variables, {.limits = options.limits, .clock = options.clock});
}

}  // namespace detour::data
