#include "data/chat_template.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "io/atomic.h"

namespace detour::data {
namespace {

namespace fs = std::filesystem;

const Json kMessages = {{{"role", "user"}, {"content", "Hi"}}};

class ChatTemplateTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "chat_template_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }
  void Write(const std::string& name, const std::string& content) {
    fs::create_directories((folder_ / name).parent_path());
    io::WriteFile((folder_ / name).string(), content);
  }
  ChatTemplate Load() const { return ChatTemplate::Load(folder_.string()); }
  std::string ErrorOf() const {
    try {
      Load().Render(kMessages);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }

  fs::path folder_;
};

TEST_F(ChatTemplateTest, WithoutTemplateChatMl) {
  const ChatTemplate chat = Load();
  EXPECT_FALSE(chat.from_model());
  EXPECT_EQ(chat.Render(kMessages), "<|im_start|>user\nHi<|im_end|>\n");
  EXPECT_EQ(chat.Render(kMessages, {.add_generation_prompt = true}),
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

TEST_F(ChatTemplateTest, TheFileWinsOverTheConfig) {
  Write("tokenizer_config.json", R"({"bos_token": "<s>", "eos_token": {"content": "</s>"},
      "pad_token": null, "chat_template": "config {{ bos_token }}{{ eos_token }}{{ pad_token is defined }}"})");
  EXPECT_EQ(Load().Render(kMessages), "config <s></s>False");
  Write("special_tokens_map.json", R"({"bos_token": "<other>", "pad_token": "<pad>"})");
  EXPECT_EQ(Load().Render(kMessages), "config <s></s>True");
  Write("chat_template.jinja", "file {{ messages[0].content }} {{ tools }} {{ documents }}\n");
  EXPECT_EQ(Load().Render(kMessages), "file Hi None None");
}

TEST_F(ChatTemplateTest, NamedTemplates) {
  Write("tokenizer_config.json", R"({"chat_template": [{"name": "default", "template": "d"},
      {"name": "tool_use", "template": "t"}, {"name": "rag", "template": "r{{ x }}"}]})");
  const ChatTemplate chat = Load();
  EXPECT_EQ(chat.Render(kMessages), "d");
  EXPECT_EQ(chat.Render(kMessages, {.variables = {{"tools", Json::array()}}}), "t");
  EXPECT_EQ(chat.Render(kMessages, {.variables = {{"x", 1}}, .template_name = "rag"}), "r1");
  EXPECT_THROW(chat.Render(kMessages, {.template_name = "nosuch"}), Error);
  Write("additional_chat_templates/tool_use.jinja", "T");
  Write("chat_template.jinja", "D");
  EXPECT_EQ(Load().Render(kMessages, {.variables = {{"tools", Json::array()}}}), "T");
  EXPECT_EQ(Load().Render(kMessages), "D");
}

TEST_F(ChatTemplateTest, TextFromElsewhereAndExtraVariables) {
  const auto chat = ChatTemplate::FromText("{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ x }}",
                                           {{"bos_token", "<s>"}});
  ChatOptions options{.variables = {{"x", "!"}, {"bos_token", "<b>"}}};
  options.clock = [] { return std::tm{.tm_mday = 26, .tm_mon = 6, .tm_year = 124}; };
  EXPECT_EQ(chat.Render(kMessages, options), "<b>26 Jul 2024!");
}

TEST_F(ChatTemplateTest, ErrorsNameTheFile) {
  Write("chat_template.jinja", "a\n{% if %}");
  EXPECT_EQ(ErrorOf(), "[data.jinja] " + (folder_ / "chat_template.jinja").string() +
                           ": line 2: expected an expression, got \"%}\"");
  Write("chat_template.jinja", std::string(2 << 20, 'a'));
  EXPECT_NE(ErrorOf(), "no error");
  fs::remove(folder_ / "chat_template.jinja");
  for (const char* config :
       {"{", "[]", R"({"chat_template": 1})", R"({"chat_template": [1]})",
        R"({"chat_template": [{"name": "default"}]})", R"({"bos_token": 1})",
        R"({"chat_template": [{"name": "a", "template": "b"}]})", R"({"chat_template": {}})"}) {
    Write("tokenizer_config.json", config);
    EXPECT_NE(ErrorOf(), "no error") << config;
  }
  EXPECT_THROW(ChatTemplate::Load((folder_ / "nosuch").string()), Error);
}

TEST_F(ChatTemplateTest, MessagesAreObjects) {
  const ChatTemplate chat = Load();
  EXPECT_THROW(chat.Render(Json::object()), Error);
  EXPECT_THROW(chat.Render({1, 2}), Error);
  EXPECT_THROW(chat.Render({{{"role", "user"}}}), Error);  // no content
  EXPECT_THROW(chat.Render({{{"role", "user"}, {"content", "\xFF"}}}), Error);
}

}  // namespace
}  // namespace detour::data
