// What templates are refused, with which message, and how soon the limits end one. The values of
// expressions: jinja_oracle_test.cc.
#include "data/jinja.h"

#include <gtest/gtest.h>

#include <ctime>
#include <string>

#include "data/chat_template.h"

namespace detour::data::jinja {
namespace {

std::string Render(const std::string& source, const Json& variables = Json::object(),
                   const RenderOptions& options = {}) {
  return Template(source, "t").Render(variables, options);
}

std::string ErrorOf(const std::string& source, const Json& variables = Json::object(),
                    const RenderOptions& options = {}) {
  try {
    Render(source, variables, options);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), "data.jinja");
    return error.what();
  }
  return "no error";
}

std::string Repeat(const std::string& text, int count) {
  std::string out;
  for (int i = 0; i < count; ++i) out += text;
  return out;
}

TEST(Jinja, ErrorsNameTheLine) {
  EXPECT_EQ(ErrorOf("a\nb{{ x.y }}"), "[data.jinja] t: line 2: 'x' is undefined");
  EXPECT_EQ(ErrorOf("{% if a %}\n\n{% endfor %}"),
            "[data.jinja] t: line 3: unknown tag \"endfor\"");
  EXPECT_EQ(ErrorOf("{%- set a = 1 %}\n{{ raise_exception('no\nway') }}"),
            "[data.jinja] t: line 2: the template refuses: no\\x0away");
  EXPECT_EQ(ErrorOf("{{\n\n1 // 0 }}"), "[data.jinja] t: line 3: division by zero");
  EXPECT_EQ(ErrorOf("{{ [1,\n2]|wordwrap }}"),
            "[data.jinja] t: line 2: not supported: the filter \"wordwrap\"");
  EXPECT_EQ(ErrorOf("{% macro m() %}\n{{ 1 }}{% endmacro %}\n\n{{ m(\n1) }}"),
            "[data.jinja] t: line 4: the macro m takes not more than 0 arguments");
  EXPECT_EQ(ErrorOf("{{ 'abc"), "[data.jinja] t: line 1: the string has no end");
}

TEST(Jinja, SyntaxErrors) {
  for (const char* source : {"{{",
                             "{{ }}",
                             "{{ a",
                             "{% if %}{% endif %}",
                             "{% if a %}",
                             "{% else %}",
                             "{% endif %}",
                             "{% for a b %}{% endfor %}",
                             "{% for a in b %}",
                             "{{ a b }}",
                             "{{ a.}}",
                             "{{ (a }}",
                             "{{ a) }}",
                             "{{ [1 }}",
                             "{{ {1} }}",
                             "{{ a[ }}",
                             "{{ f(a=1, 2) }}",
                             "{{ f(a=1, a=2) }}",
                             "{{ a is }}",
                             "{{ a is b is c }}",
                             "{{ a| }}",
                             "{{ a if }}",
                             "{{ not }}",
                             "{{ a and }}",
                             "{% set 1 = 2 %}",
                             "{% set none = 2 %}",
                             "{% set a %}",
                             "{% macro m(a, a) %}{% endmacro %}",
                             "{% macro m(a=1, b) %}{% endmacro %}",
                             "{% break %}",
                             "{% raw %}",
                             "{# a",
                             "{{ 'a }}",
                             "{{ \"\\x4\" }}",
                             "{{ 1 ! 2 }}",
                             "{{ 0x }}",
                             "{{ 99999999999999999999 }}",
                             "{{ a.b. }}",
                             "{% call f %}{% endcall %}",
                             "{% nosuch %}",
                             "{% include 'a' %}",
                             "{% extends 'a' %}",
                             "{% import 'a' as b %}",
                             "{% block a %}{% endblock %}",
                             "{% for a in b recursive %}{% endfor %}",
                             "{{ \xC3\xA9 }}",
                             "\xFF"}) {
    EXPECT_NE(ErrorOf(source), "no error") << source;
  }
}

TEST(Jinja, TheSandboxHidesWhatChangesValues) {
  const Json variables = {{"l", {1, 2}}, {"d", {{"a", 1}}}};
  for (const char* source :
       {"{{ l.append(3) }}", "{{ l.sort() }}", "{{ d.update({}) }}", "{{ d.pop('a') }}",
        "{{ l['clear']() }}", "{{ ''.__class__.__mro__ }}", "{{ l.__class__() }}",
        "{{ namespace(_a=1) }}", "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{% set d.a = 2 %}", "{{ range.__globals__.x }}", "{{ '{}'.format(1) }}"}) {
    EXPECT_NE(ErrorOf(source, variables), "no error") << source;
  }
  EXPECT_EQ(Render("{{ l.append }}{{ ''.__class__ }}", variables), "");
}

TEST(Jinja, CyclesThroughNamespacesAreFreed) {
  // The address sanitizer's part of this test: nothing leaks, nothing overflows the stack.
  EXPECT_EQ(Render("{% set a = namespace() %}{% set b = namespace(a=a, l=[a]) %}{% set a.b = b %}"
                   "{% macro m() %}{% endmacro %}{% set a.m = m %}{{ a.b.a.b.l|length }}"
                   "{% for x in [1] %}{% set a.loop = loop %}{{ loop.changed(loop) }}{% endfor %}"),
            "1True");
  EXPECT_NE(ErrorOf("{% set a = namespace() %}{% set a.a = a %}{{ a }}").find("nested deeper"),
            std::string::npos);
}

TEST(Jinja, TemplatesThatNestTooDeepAreRefused) {
  const int n = 100'000;
  for (const std::string& source :
       {"{{ " + Repeat("(", n) + "1" + Repeat(")", n) + " }}", "{{ " + Repeat("[", n) + " }}",
        "{{ " + Repeat("not ", n) + "1 }}", "{{ " + Repeat("-", n) + "1 }}",
        "{{ 1" + Repeat("+1", n) + " }}", "{{ 1" + Repeat("|d", n) + " }}",
        "{{ a" + Repeat(".a", n) + " }}", "{{ a" + Repeat("()", n) + " }}",
        "{{ a" + Repeat(" if 1 else 1", n) + " }}", Repeat("{% if 1 %}", n),
        "{{ a" + Repeat("[a", n) + " }}", "{% set " + Repeat("(", n) + " %}",
        "{{ 1" + Repeat(" if 1", n) + " }}", "{{ a" + Repeat(" or b", n) + " }}"}) {
    EXPECT_NE(ErrorOf(source), "no error") << source.substr(0, 20);
  }
  const std::string list =
      "{% set ns = namespace(a=[]) %}{% for i in range(100000) %}{% set ns.a = WHAT %}{% endfor %}";
  for (const char* what : {"[ns.a]", "{'a': ns.a}", "ns.a|map('upper')", "(ns.a,)"}) {
    std::string source = list;
    source.replace(source.find("WHAT"), 4, what);
    EXPECT_NE(ErrorOf(source).find("nested deeper"), std::string::npos) << what << ErrorOf(source);
  }
  EXPECT_NE(ErrorOf("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").find("nested deeper"),
            std::string::npos);
}

// Each of these would take very long or very much without limits.
TEST(Jinja, LimitsEndEveryTemplateSoon) {
  const std::string loop = "{% for a in range(100000) %}{% for b in range(100000) %}";
  const std::string end = "{% endfor %}{% endfor %}";
  const std::string doubling = "{% set ns = namespace(x=X) %}{% for i in range(100) %}";
  const auto twice = [&](const std::string& start, const std::string& step) {
    std::string source = doubling + "{% set ns.x = " + step + " %}{% endfor %}{{ ns.x|length }}";
    source.replace(source.find("x=X") + 2, 1, start);
    return source;
  };
  const Json variables = {{"long", std::string(1 << 20, 'a')},
                          {"wide", Repeat("\u00e9", 1 << 19)},
                          {"list", Json(std::vector<int>(50'000, 1))}};
  for (const std::string& source : {
           loop + end,
           loop + "x" + end,
           loop + "{{ long }}" + end,
           loop + "{{ long|upper|length }}" + end,
           loop + "{{ wide|upper|length }}" + end,
           loop + "{{ wide[b:b + 1] }}" + end,
           loop + "{{ wide[b] }}" + end,
           loop + "{% if 'ab' in long %}{% endif %}" + end,
           loop + "{{ long.count('aaaaaaab') }}" + end,
           loop + "{{ wide.find('x', b) }}" + end,
           loop + "{{ long|replace('a', 'b')|length }}" + end,
           loop + "{{ long.split('a')|length }}" + end,
           loop + "{{ long.split()|length }}" + end,
           loop + "{{ wide|tojson|length }}" + end,
           loop + "{{ [wide]|string|length }}" + end,
           loop + "{{ wide.isalpha() }}{{ wide.strip(wide) }}" + end,
           loop + "{{ wide|title }}" + end,
           loop + "{{ list == list|list }}" + end,
           loop + "{{ (list|sort)[0] }}" + end,
           loop + "{% set ns = namespace() %}" + end,
           loop + "{% macro m() %}{% endmacro %}" + end,
           loop + "{% set x %}{{ long }}{% endset %}" + end,
           loop + "{{ '%Y'|map('strftime_now')|list }}{{ strftime_now('%9999999999d') }}" + end,
           twice("'ab'", "ns.x ~ ns.x"),
           twice("'ab'", "ns.x + ns.x"),
           twice("'ab'", "ns.x * 10"),
           twice("'ab'", "ns.x|replace('a', 'aaaa')"),
           twice("'ab'", "ns.x|replace('', 'ab')"),
           twice("'ab'", "ns.x.center(9000000000)"),
           twice("'ab'", "ns.x.join(ns.x)"),
           twice("['ab']", "ns.x|join(ns.x|string)|list"),
           twice("[1]", "ns.x + ns.x"),
           twice("[1]", "ns.x * 1000"),
           twice("[1]", "[ns.x, ns.x]") + "{{ ns.x|tojson }}",
           twice("[1]", "[ns.x, ns.x]") + "{{ ns.x|string }}",
           twice("[1]", "[ns.x, ns.x]") + "{{ ns.x == [ns.x[0], ns.x[0]|list] }}",
           twice("[1]", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
           std::string("{{ 'a' * 9000000000000000000 }}"),
           std::string("{{ [1] * 9000000000000000000 }}"),
           std::string("{{ 'a'|indent(9000000000000000000) }}"),
           std::string("{{ [1]|tojson(indent=9000000000000000000) }}"),
           std::string("{{ range(1000000) }}"),
           std::string("{{ 'a'.ljust(9000000000000000000) }}"),
           std::string("{% macro m(n) %}{% for i in [1, 2] %}{{ m(n + 1) }}{% endfor %}"
                       "{% endmacro %}{{ m(0) }}"),
       }) {
    const std::clock_t begin = std::clock();  // other programs' work does not count
    const std::string error = ErrorOf(source, variables);
    const double seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    // [ns.x, ns.x] nests 100 levels and is refused for that: also good.
    EXPECT_NE(error, "no error") << source;
#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    EXPECT_LT(seconds, 1.0) << source << error;
#else
    EXPECT_LT(seconds, 20.0) << source << error;
#endif
  }
}

TEST(Jinja, LimitsAreTheCallers) {
  const std::string source = "{% for i in range(100) %}{{ i }}{% endfor %}";
  EXPECT_EQ(Render(source).size(), 190);
  EXPECT_NE(ErrorOf(source, Json::object(), {.limits = {.max_steps = 100}}).find("100 steps"),
            std::string::npos);
  EXPECT_NE(
      ErrorOf(source, Json::object(), {.limits = {.max_output_bytes = 189}}).find("189 bytes"),
      std::string::npos);
  EXPECT_EQ(Render(source, Json::object(), {.limits = {.max_output_bytes = 190}}).size(), 190);
  EXPECT_NE(
      ErrorOf("{{ x }}", {{"x", std::string(2000, 'a')}}, {.limits = {.max_memory_bytes = 1000}})
          .find("1000 bytes"),
      std::string::npos);
}

TEST(Jinja, VariablesMustBeUtf8) {
  EXPECT_NE(ErrorOf("{{ x }}", {{"x", "a\xFF"}}).find("not UTF-8"), std::string::npos);
  EXPECT_EQ(Render("ok", {{"x", "a\xFF"}}), "ok");  // not read
  Json deep = 1;
  for (int i = 0; i < 200; ++i) deep = Json::array({deep});
  EXPECT_NE(ErrorOf("{{ x }}", {{"x", deep}}).find("nested deeper"), std::string::npos);
}

TEST(Jinja, ABigConversationRenders) {
  Json messages = Json::array();
  for (int i = 0; i < 2000; ++i) {
    messages.push_back(
        {{"role", i % 2 == 0 ? "user" : "assistant"}, {"content", std::string(1000, 'x')}});
  }
  const auto chat = ChatTemplate::FromText(ChatTemplate::DefaultText(), {});
  EXPECT_GT(chat.Render(messages).size(), 2'000'000);
}

}  // namespace
}  // namespace detour::data::jinja
