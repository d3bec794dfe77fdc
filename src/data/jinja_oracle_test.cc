// Against jinja2 and transformers: tests/jinja_oracle.py writes templates, variables and what they
// render to; here they are compared.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

#include "core/json.h"
#include "data/chat_template.h"
#include "data/jinja.h"
#include "data/jinja_text.h"
#include "io/atomic.h"

namespace detour::data {
namespace {

namespace fs = std::filesystem;

std::tm Clock() {  // the oracle's
  return {.tm_sec = 9,
          .tm_min = 5,
          .tm_hour = 13,
          .tm_mday = 26,
          .tm_mon = 6,
          .tm_year = 124,
          .tm_wday = 5,
          .tm_yday = 207};
}

class JinjaOracle : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const std::string root = DETOUR_SOURCE_DIR;
    if (!fs::exists(root + "/.venv/bin/python")) return;
    std::string name = (fs::temp_directory_path() / "jinja_oracle_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = new fs::path(name);
    // The sanitizers' preloads are not for Python.
    const std::string command = "'" + root + "/.venv/bin/python' '" + root +
                                "/tests/jinja_oracle.py' make '" + name + "' >&2";
    ASSERT_EQ(std::system(command.c_str()), 0);
  }
  static void TearDownTestSuite() {
    if (folder_ != nullptr) fs::remove_all(*folder_);
    delete folder_;
    folder_ = nullptr;
  }
  void SetUp() override {
    if (folder_ == nullptr) {
      GTEST_SKIP() << "no .venv/bin/python: run scripts/setup to compare with jinja2";
    }
  }

  static Json ReadJson(const fs::path& path) {
    return ParseJson(io::ReadFile(path.string()), path.string());
  }

  // Compares what `render` gives with `expected`: a text, or null where it must be an Error.
  // Returns whether both agree.
  template <typename Render>
  static bool Check(const std::string& what, const Json& expected, Render render) {
    std::optional<std::string> text;
    std::string error;
    try {
      text = render();
    } catch (const Error& e) {
      error = e.what();
    }
    const bool equal = expected.is_null() ? !text : text && *text == expected.get<std::string>();
    if (!equal) {
      ADD_FAILURE() << what << "\nexpected " << expected.dump(-1, ' ', true).substr(0, 2000)
                    << "\ngot      "
                    << (text ? Json(*text).dump(-1, ' ', true) : error).substr(0, 2000);
    }
    return equal;
  }

  // A list of [template, text] on the same variables.
  static void CheckFile(const char* name) {
    const Json variables = ReadJson(*folder_ / "variables.json");
    int num_bad = 0;
    for (const Json& test_case : ReadJson(*folder_ / name)) {
      const std::string source = test_case[0].get<std::string>();
      const bool equal = Check(source, test_case[1], [&] {
        return jinja::Template(source).Render(variables, {.clock = Clock});
      });
      if (!equal && ++num_bad == 20) break;
    }
  }

  static fs::path* folder_;
};

fs::path* JinjaOracle::folder_ = nullptr;

TEST_F(JinjaOracle, TemplatesOfModelFamilies) {
  for (const Json& test_case : ReadJson(*folder_ / "real.json")) {
    const std::string source = test_case[0].get<std::string>();
    const std::string what = source.substr(0, 200) + "\n" + test_case[1].dump().substr(0, 1000);
    const bool equal = Check(what, test_case[2], [&] {
      return jinja::Template(source).Render(test_case[1], {.clock = Clock});
    });
    if (!equal) break;
  }
}

TEST_F(JinjaOracle, RandomExpressions) { CheckFile("expressions.json"); }

TEST_F(JinjaOracle, RandomTemplates) { CheckFile("random.json"); }

TEST_F(JinjaOracle, ApplyChatTemplateOfTransformers) {
  int num_folders = 0;
  for (const auto& entry : fs::directory_iterator(*folder_ / "chat")) {
    ++num_folders;
    const auto chat = ChatTemplate::Load(entry.path().string());
    EXPECT_TRUE(chat.from_model());
    for (const Json& test_case : ReadJson(entry.path() / "cases.json")) {
      ChatOptions options{.variables = test_case[1], .clock = Clock};
      options.add_generation_prompt = options.variables["add_generation_prompt"].get<bool>();
      const std::string what = entry.path().filename().string() + " " + test_case[0].dump();
      if (!Check(what, test_case[2], [&] { return chat.Render(test_case[0], options); })) break;
    }
  }
  EXPECT_GE(num_folders, 8);
}

TEST_F(JinjaOracle, CaseMappingsAndReprsArePythons) {
  const Json tables = ReadJson(*folder_ / "case.json");
  int num_bad = 0;
  for (const Json& row : tables["cases"]) {
    const std::string text = row[0].get<std::string>();
    const auto has = [&](jinja::Property property) { return *jinja::Has(property, text); };
    const Json got = {text,
                      jinja::ToUpper(text),
                      jinja::ToLower(text),
                      jinja::ToTitle(text),
                      jinja::Capitalize(text),
                      jinja::StringRepr(text),
                      has(jinja::Property::kLower),
                      has(jinja::Property::kUpper),
                      has(jinja::Property::kAlpha),
                      has(jinja::Property::kAlnum),
                      has(jinja::Property::kDecimal)};
    if (got == row) continue;
    ADD_FAILURE() << "expected " << row.dump(-1, ' ', true) << "\ngot      "
                  << got.dump(-1, ' ', true);
    if (++num_bad == 5) break;
  }
  for (const Json& row : tables["repr"]) {
    EXPECT_EQ(jinja::StringRepr(row[0].get<std::string>()), row[1].get<std::string>());
  }
}

}  // namespace
}  // namespace detour::data
