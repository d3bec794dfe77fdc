#include "report/html.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <set>
#include <stdexcept>

#include "core/rng.h"

namespace detour::report {
namespace {

const std::string kHostile[] = {"<script>alert(1)</script>",
                                "</script><!--",
                                "\"' onmouseover='x",
                                std::string("a\0b", 3),
                                "\xff\xc3(\xed\xa0\x80",
                                "\u202Eevil\u2028&amp;",
                                "]]>",
                                "\x1b[2J\r\n",
                                std::string(150, '=')};

/// "" if every tag is closed in order and every attribute quoted, else what is wrong.
std::string FindImbalance(const std::string& html) {
  const std::set<std::string> kVoid = {"meta", "br"};
  std::vector<std::string> open;
  for (size_t at = 0; (at = html.find('<', at)) != std::string::npos;) {
    if (html.compare(at, 9, "<!DOCTYPE") == 0) {
      at = html.find('>', at);
      continue;
    }
    const bool closing = html[at + 1] == '/';
    size_t i = at + 1 + closing;
    std::string name;
    while (std::isalnum(static_cast<unsigned char>(html[i]))) name += html[i++];
    if (name.empty()) return "stray <: " + html.substr(at, 30);
    bool quoted = false;
    for (; i < html.size() && (quoted || html[i] != '>'); ++i) {
      if (html[i] == '"') quoted = !quoted;
      if (!quoted && html[i] == '<') return "< inside a tag: " + html.substr(at, 60);
      if (!quoted && html[i] == '=' && html[i + 1] != '"')
        return "unquoted: " + html.substr(at, 60);
    }
    if (i >= html.size()) return "tag without end: " + html.substr(at, 60);
    const bool self_closing = html[i - 1] == '/';
    at = i;
    if (closing) {
      if (open.empty() || open.back() != name) return "unexpected </" + name + ">";
      open.pop_back();
    } else if (!self_closing && !kVoid.contains(name)) {
      open.push_back(name);
      if (name == "script" || name == "style") at = html.find("</" + name + ">", at);
    }
  }
  return open.empty() ? "" : "never closed: " + open.back();
}

/// A subword text of `num_tokens`, made of a president's words and some hostile ones.
RouteMap FakeMap(int num_layers, int num_tokens) {
  const std::vector<std::string> kText = {" The",        " state",       " of",     " the",
                                          " Union",      " is",          " strong", ",",
                                          " and",        " our",         " econom", "y",
                                          " is",         " growing",     ".",       " In",
                                          " the",        " past",        " year",   ",",
                                          " we",         " have",        " creat",  "ed",
                                          " more",       " than",        " two",    " million",
                                          " jobs",       "; ",           "un",      "employ",
                                          "ment",        " has",         " fallen", " to",
                                          " the",        " low",         "est",     " level",
                                          " in",         " a",           " gener",  "ation",
                                          ".",           "\n\n",         "Fellow",  " citizens",
                                          ":",           " tonight",     " I",      " ask",
                                          " the",        " Congress",    " to",     " act",
                                          ".",           " caf",         "\xC3",    "\xA9",
                                          " na\u00EFve", " \u65E5\u672C"};
  RouteMap map;
  map.title = "Which tokens attended, layer by layer";
  map.note =
      "The first 300 tokens of a validation document. Hover or tap a token for its probabilities.";
  map.first_position = 8192;
  const Rng rng(3, RngPurpose::kTest);
  for (int t = 0; t < num_tokens; ++t) {
    const bool hostile = t >= 200 && t < 200 + static_cast<int>(std::size(kHostile));
    map.tokens.push_back(hostile ? kHostile[t - 200] : kText[t % kText.size()]);
  }
  for (int l = 0; l < num_layers; ++l) {
    map.layer_names.push_back(std::to_string(l));
    const bool routed = l % 2 == 1;
    map.kinds.push_back(routed ? LayerKind::kRouted : LayerKind::kDense);
    for (int t = 0; t < num_tokens; ++t) {
      const double logit = -1.8 + 1.6 * rng.Normal(t) + 0.8 * rng.Normal(100000 + l * 1000 + t);
      map.p.push_back(static_cast<float>(1 / (1 + std::exp(-logit))));
      map.routed.push_back(!routed || logit > 0);
    }
  }
  return map;
}

LineChart FakeLoss(int num_steps) {
  LineChart chart{
      .title = "Training and validation loss", .x_label = "step", .y_label = "nats per token"};
  chart.note = "Equal data, seed and schedule. Validation on held-out speeches every 25 steps.";
  const Rng rng(5, RngPurpose::kTest);
  for (int model = 0; model < 2; ++model) {
    Series train{
        .name = model ? "DTRNet, training" : "dense, training", .faint = true, .color = model};
    Series val{.name = model ? "DTRNet, validation" : "dense, validation", .color = model};
    for (int step = 1; step <= num_steps; ++step) {
      const double loss = 3.1 + 0.03 * model + 5.3 * std::exp(-step * 6.0 / num_steps) +
                          0.6 * std::exp(-step * 1.5 / num_steps);
      train.xs.push_back(step);
      train.ys.push_back(loss + 0.05 * rng.Normal(model * num_steps + step));
      if (step % (num_steps / 20) == 0) {
        val.xs.push_back(step);
        val.ys.push_back(loss + 0.08);
      }
    }
    chart.series.push_back(std::move(train));
    chart.series.push_back(std::move(val));
  }
  return chart;
}

std::string FakePage() {
  HtmlPage page(
      "Detour: a routed Transformer beside its dense twin",
      "Two models of 4.2M parameters, trained on the same State of the Union addresses in the same "
      "order; in every second layer of one of them most tokens skip attention.");
  page.KeyFigures({{"14.8%", "tokens that attend", "in the routed layers"},
                   {"+0.9%", "validation loss", "against the dense twin"},
                   {"0.54×", "key-value bytes", "at 32K tokens of context"},
                   {"1.23×", "training speed", "tokens per second"}});
  page.Heading("The two models, side by side");
  page.Paragraph(
      "Everything below is measured on this machine; FLOPs are counted where they are executed.");
  page.Table({.title = "Quality and cost",
              .columns = {"dense", "DTRNet"},
              .rows = {{.metric = "Quality", .section = true},
                       {"validation loss", "nats per token", {"3.214", "3.243"}},
                       {"bits per byte", "", {"1.402", "1.415"}},
                       {.metric = "Cost", .section = true},
                       {"parameters", "the routers come on top", {"4,194,304", "4,260,864"}},
                       {"FLOPs per token", "forward, at 1,024 tokens", {"10.9 M", "9.12 M"}},
                       {"training speed", "", {"12.3k tok/s", "15.1k tok/s"}},
                       {"peak memory", "training", {"1.21 GiB", "1.05 GiB"}},
                       {"KV bytes at 1K", "", {"4.00 MiB", "2.31 MiB"}},
                       {"KV bytes at 8K", "", {"32.0 MiB", "18.4 MiB"}},
                       {"KV bytes at 32K", "", {"128 MiB", "73.5 MiB"}},
                       {"decoding speed", "one stream", {"512 tok/s", "604 tok/s"}}},
              .note = "Energy: no RAPL counters on this machine."});
  page.Heading("Learning");
  page.Chart(FakeLoss(500));
  LineChart kv{.title = "Key-value cache", .x_label = "context, tokens", .y_label = "bytes"};
  kv.log_x = kv.y_from_zero = kv.markers = true;
  kv.y_style = NumberStyle::kBytes;
  for (int model = 0; model < 2; ++model) {
    Series s{.name = model ? "DTRNet" : "dense"};
    for (int k = 10; k <= 15; ++k) {
      s.xs.push_back(1 << k);
      s.ys.push_back((1 << k) * 4096.0 * (model ? 0.57 : 1));
    }
    kv.series.push_back(s);
  }
  for (int k = 10; k <= 15; ++k)
    kv.x_ticks.emplace_back(1 << k, std::to_string(1 << (k - 10)) + "K");
  page.Chart(kv);
  page.Heading("Where tokens attend");
  page.Chart(BarChart{.title = "Share of tokens that attend, per layer",
                      .x_label = "layer",
                      .y_label = "share of tokens",
                      .categories = {"0", "1", "2", "3", "4", "5", "6", "7"},
                      .series = {{"DTRNet",
                                  {1, .18, 1, .127, 1, .149, 1, .136},
                                  {true, false, true, false, true, false, true, false},
                                  1}},
                      .y_style = NumberStyle::kPercent,
                      .y_max = 1,
                      .reference = 0.15,
                      .reference_label = "target 15%",
                      .muted_label = "dense layer"});
  page.Map(FakeMap(8, 300));
  page.Heading("What they write");
  page.TextSamples(
      {{"dense", "My fellow citizens,",
        " the state of the Union is strong, and the work of the Congress\n"
        "has been to secure the peace of the country.\n\n<script>alert(1)</script>\tend"},
       {"DTRNet", "My fellow citizens,",
        " we have to make a great deal of progress in the field of "
        "education and of the public lands, and "
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa."}});
  page.Footer("Written by detour 0.1.0 · seed 42 · 2 threads");
  return page.Render();
}

TEST(Html, EscapesHostileText) {
  EXPECT_EQ(EscapeHtml("<a href=\"x\">'&"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;");
  EXPECT_EQ(EscapeHtml(std::string("a\0b\x1b\x7f\n\t", 7)), "a\\x00b\\x1B\\x7F\n\t");
  EXPECT_EQ(EscapeHtml("\xff\xc3(\xe2\x82"), "\\xFF\\xC3(\\xE2\\x82");
  EXPECT_EQ(
      EscapeHtml("\xc0\xaf\xed\xa0\x80\xf4\x90\x80\x80"),  // overlong, surrogate, beyond Unicode
      "\\xC0\\xAF\\xED\\xA0\\x80\\xF4\\x90\\x80\\x80");
  EXPECT_EQ(EscapeHtml("é日🙂\u202E\u0085\u2028"), "é日🙂\\u{202E}\\u{0085}\\u{2028}");
}

TEST(Html, PageIsWellFormedAndSelfContained) {
  const std::string page = FakePage();
  EXPECT_EQ(FindImbalance(page), "");
  for (const char* forbidden :
       {"http://", "https://", "src=", "@import", "<link", "<iframe", "<script>alert", "<!--"}) {
    EXPECT_EQ(page.find(forbidden), std::string::npos) << forbidden;
  }
  EXPECT_EQ(page.find('\0'), std::string::npos);
  EXPECT_NE(page.find("&lt;script&gt;alert(1)"), std::string::npos);
  EXPECT_NE(page.find("a\\x00b"), std::string::npos);
  EXPECT_LT(page.size(), 400'000u);
  EXPECT_EQ(page, FakePage());
}

TEST(Html, HostileTextInEveryPlace) {
  for (const std::string& s : kHostile) {
    SCOPED_TRACE(EscapeHtml(s));
    HtmlPage page(s, s);
    page.Heading(s);
    page.Paragraph(s);
    page.KeyFigures({{s, s, s}});
    page.Table({s, {s}, {{s, s, {s}}, {.metric = s, .section = true}}, s});
    page.Chart(LineChart{.title = s,
                         .x_label = s,
                         .y_label = s,
                         .series = {{s, {1, 2}, {1, 2}}},
                         .x_ticks = {{1, s}},
                         .note = s});
    page.Chart(BarChart{.title = s,
                        .x_label = s,
                        .y_label = s,
                        .categories = {s},
                        .series = {{s, {1}, {true}}},
                        .reference = 1,
                        .reference_label = s,
                        .muted_label = s,
                        .note = s});
    page.Map({s, s, {s}, {s}, {LayerKind::kRouted}, {1}, {0.5f}});
    page.TextSamples({{s, s, s}});
    page.Footer(s);
    const std::string html = page.Render();
    EXPECT_EQ(FindImbalance(html), "");
    EXPECT_EQ(html.find("<script>alert"), std::string::npos);
  }
}

TEST(Html, NiceTicks) {
  EXPECT_EQ(NiceTicks(0, 10, 5), (std::vector<double>{0, 2, 4, 6, 8, 10}));
  EXPECT_EQ(NiceTicks(0, 1, 4), (std::vector<double>{0, 0.25, 0.5, 0.75, 1}));
  EXPECT_EQ(NiceTicks(-3, 7, 4), (std::vector<double>{-2.5, 0, 2.5, 5}));
  EXPECT_EQ(NiceTicks(101, 499, 4), (std::vector<double>{200, 300, 400}));
  for (const auto& [lo, hi] : std::vector<std::pair<double, double>>{
           {1e-12, 3e-12}, {-1e300, 1e300}, {1e9, 1e9 + 1}, {-7, -0.3}, {0, 0.3}}) {
    for (int n = 1; n < 12; ++n) {
      const auto ticks = NiceTicks(lo, hi, n);
      EXPECT_LE(ticks.size(), n + 1u);
      for (double t : ticks) {
        EXPECT_GE(t, lo - 1e-6 * (hi - lo));
        EXPECT_LE(t, hi + 1e-6 * (hi - lo));
      }
    }
  }
  EXPECT_THROW(NiceTicks(1, 1, 3), std::logic_error);
}

TEST(Html, ChartsOfOddData) {
  const double nan = std::numeric_limits<double>::quiet_NaN(),
               inf = std::numeric_limits<double>::infinity();
  const std::vector<LineChart> lines = {
      {},
      {.series = {{"none", {}, {}}}},
      {.series = {{"one", {3}, {7}}}, .markers = true},
      {.series = {{"flat", {1, 2, 3}, {5, 5, 5}}}},
      {.series = {{"gaps", {1, 2, 3, 4, 5}, {1, nan, 2, inf, 3}}}},
      {.series = {{"zero in log", {0, 1, 10, 1e6}, {1, 2, 3, 4}}}, .log_x = true},
      {.series = {{"all bad", {nan, inf}, {nan, -inf}}}},
      {.series = {{"huge", {0, 1e300}, {-1e300, 1e300}}}, .y_from_zero = true},
  };
  for (size_t i = 0; i < lines.size(); ++i) {
    SCOPED_TRACE(i);
    for (int width : {760, 360}) {
      const std::string svg = LineChartSvg(lines[i], width);
      EXPECT_EQ(FindImbalance(svg), "");
      for (const char* bad : {"nan", "inf\"", "inf ", "-inf"})
        EXPECT_EQ(svg.find(bad), std::string::npos) << svg;
    }
    HtmlPage page("odd");
    page.Chart(lines[i]);
    EXPECT_EQ(FindImbalance(page.Render()), "");
  }
  // The isolated points of "gaps" are drawn as dots.
  EXPECT_NE(LineChartSvg(lines[4], 760).find("h0M"), std::string::npos);
  for (const BarChart& bars :
       std::vector<BarChart>{{},
                             {.categories = {"a"}, .series = {{"s", {nan}}}},
                             {.categories = {"a", "b"}, .series = {{"s", {-1, 2}}}}}) {
    const std::string svg = BarChartSvg(bars, 360);
    EXPECT_EQ(FindImbalance(svg), "");
    EXPECT_EQ(svg.find("nan"), std::string::npos) << svg;
  }
  EXPECT_THROW(LineChartSvg({.series = {{"s", {1, 2}, {1}}}}, 360), std::logic_error);
  EXPECT_THROW(BarChartSvg({.categories = {"a"}, .series = {{"s", {}}}}, 360), std::logic_error);
}

TEST(Html, LongSeriesKeepTheirExtremes) {
  Series s{.name = "long"};
  for (int i = 0; i < 200'000; ++i) {
    s.xs.push_back(i);
    s.ys.push_back(i == 77'777 ? 1000 : i % 7);
  }
  const std::string svg = LineChartSvg({.series = {s}, .y_style = NumberStyle::kPlain}, 760);
  EXPECT_LT(svg.size(), 30'000u);
  EXPECT_NE(svg.find(">1000<"), std::string::npos);  // the axis reaches the spike
}

TEST(Html, RouteMapOfManyLayersAndNoTokens) {
  EXPECT_EQ(FindImbalance(RouteMapHtml(FakeMap(48, 100), 0)), "");
  EXPECT_EQ(FindImbalance(RouteMapHtml(FakeMap(1, 0), 0)), "");
  RouteMap wrong = FakeMap(4, 10);
  wrong.p.pop_back();
  EXPECT_THROW(RouteMapHtml(wrong, 0), std::logic_error);
}

TEST(Html, RunsInABrowser) {
  const char* keep = std::getenv("DETOUR_PAGE_OUT");
  const std::string path = keep ? keep
                                : (std::filesystem::temp_directory_path() /
                                   ("detour_page_" + std::to_string(getpid()) + ".html"))
                                      .string();
  std::ofstream(path, std::ios::binary) << FakePage();
  const int status =
      std::system(("python3 " DETOUR_SOURCE_DIR "/tests/page_browser_test.py " + path).c_str());
  if (!keep) std::filesystem::remove(path);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 77) GTEST_SKIP() << "no Chromium";
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace detour::report
