#include "cli/run_config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "core/error.h"

namespace detour::cli {
namespace {

using Strings = std::vector<std::string>;

struct Options {
  int64_t seq_len = 512;
  double lr = 1e-5;
  std::string name, out_dir = "out", text_with_default = "a \"b\" \\ c";
  Strings stop;
  std::vector<int> layers = {1, 3};
  bool verbose = false, tied = true;
  int64_t max_steps = 100, max_tokens = 7, max_time = 0;
  std::string input;

  bool operator==(const Options&) const = default;
};

// `detour train` with every kind of option.
class RunConfig : public testing::Test {
 protected:
  struct Program {
    CLI::App app{"", "detour"};
    Options options;
    CLI::App* train;
    Program() {
      app.option_defaults()->always_capture_default();
      app.require_subcommand(1);
      app.add_subcommand("info");
      train = app.add_subcommand("train");
      train->add_option("-s,--seq-len", options.seq_len, "Tokens per row")
          ->check(CLI::PositiveNumber);
      train->add_option("--lr", options.lr);
      train->add_option("--name", options.name);
      train->add_option("--out-dir", options.out_dir);
      train->add_option("--text-with-default", options.text_with_default);
      train->add_option("--stop", options.stop);
      train->add_option("--layers", options.layers)->delimiter(',');
      train->add_option("input", options.input);
      AddFlag(*train, "--verbose", options.verbose, "Say more");
      AddFlag(*train, "--tied,!--untied", options.tied, "Tie the head");
      auto* steps = train->add_option("--max-steps", options.max_steps);
      train->add_option("--max-tokens", options.max_tokens)->excludes(steps);
      train->add_option("--max-time", options.max_time)->check(CLI::PositiveNumber);
      AddRunConfigOptions(*train);
    }
    std::map<std::string, std::string> Parse(const Strings& args) {
      const ExpandedArgs expanded = ExpandRunConfig(app, args);
      app.parse(Strings(expanded.args.rbegin(), expanded.args.rend()));
      return expanded.origin;
    }
  };

  std::string Write(const std::string& text) {
    const std::string path =
        testing::TempDir() + "run_config_test_" + std::to_string(getpid()) + ".toml";
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }

  Options Parse(const std::string& toml, const Strings& more = {}) {
    Program program;
    Strings args = {"train", "--config", Write(toml)};
    args.insert(args.end(), more.begin(), more.end());
    program.Parse(args);
    return program.options;
  }

  std::string ErrorOf(const std::string& toml) {
    try {
      Parse(toml);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), "cli.run_config");
      const std::string what = e.what();
      return what.substr(what.rfind(".toml") == std::string::npos ? 0 : what.find(".toml") + 5);
    }
    return "no error";
  }
};

TEST_F(RunConfig, ReadsEveryKindOfOption) {
  const Options o = Parse(R"(
seq-len = 1_024
name = "two words, a comma"
stop = ["a,b", "-c", ""]
layers = [5, 7]
max_steps = 1e6
[anything]
lr = 3
[anything.deeper]
tied = false
verbose = true
)");
  EXPECT_EQ(o.seq_len, 1024);
  EXPECT_EQ(o.name, "two words, a comma");
  EXPECT_EQ(o.stop, (Strings{"a,b", "-c", ""}));
  EXPECT_EQ(o.layers, (std::vector<int>{5, 7}));
  EXPECT_EQ(o.max_steps, 1000000);
  EXPECT_EQ(o.lr, 3);
  EXPECT_FALSE(o.tied);
  EXPECT_TRUE(o.verbose);
  EXPECT_EQ(o.out_dir, "out");

  EXPECT_EQ(Parse("name = [2048, \"x\"]").name, "2048,x");
  EXPECT_EQ(Parse("out_dir = \"\"").out_dir, "");
  EXPECT_EQ(Parse("name = \"-5\"").name, "-5");
  EXPECT_FALSE(Parse("untied = true").tied);
}

TEST_F(RunConfig, CommandLineWins) {
  const std::string toml =
      "seq_len = 1\nlayers = [9]\ntied = false\nstop = [\"x\"]\nname = \"file\"\n";
  const Options o = Parse(toml, {"-s", "2", "--layers=4", "--tied", "--stop", "y", "--name=user"});
  EXPECT_EQ(o.seq_len, 2);
  EXPECT_EQ(o.layers, std::vector<int>{4});
  EXPECT_TRUE(o.tied);
  EXPECT_EQ(o.stop, Strings{"y"});
  EXPECT_EQ(o.name, "user");
  EXPECT_EQ(Parse("tied = true", {"--untied"}).tied, false);
}

TEST_F(RunConfig, ListsLeavePositionalArgumentsAlone) {
  EXPECT_EQ(Parse("stop = [\"x\"]", {"in.txt"}).input, "in.txt");
  const Options o = Parse("stop = [\"x\"]", {"--", "--in"});
  EXPECT_EQ(o.input, "--in");
  EXPECT_EQ(o.stop, Strings{"x"});
}

TEST_F(RunConfig, ErrorsNameFileAndLine) {
  EXPECT_EQ(ErrorOf("lr = 1\nseqlen = 4\n"),
            ":2: unknown key \"seqlen\". Did you mean \"seq_len\"?");
  EXPECT_EQ(ErrorOf("zzzzzzzz = 4\n"), ":1: unknown key \"zzzzzzzz\".");
  EXPECT_EQ(ErrorOf("config = \"x\"\n"), ":1: unknown key \"config\".");
  EXPECT_EQ(ErrorOf("help = true\n"), ":1: unknown key \"help\".");
  EXPECT_EQ(ErrorOf("input = \"x\"\n").substr(0, 24), ":1: unknown key \"input\".");
  EXPECT_NE(ErrorOf("[a]\nlr = 1\n[b]\nlr = 2\n").find(":4: \"lr\" is already set at"),
            std::string::npos);
  EXPECT_EQ(ErrorOf("verbose = 3\n"), ":1: verbose: expected true or false");
  EXPECT_EQ(ErrorOf("\nlr = true\n"), ":2: lr: expected a value, not true or false");
  EXPECT_EQ(ErrorOf("lr = 2020-01-01\n").substr(0, 21), ":1: lr: expected text");
  EXPECT_EQ(ErrorOf("lr = [[1]]\n").substr(0, 21), ":1: lr: expected text");
  EXPECT_EQ(ErrorOf("layers = []\n").substr(0, 21), ":1: layers: expected ");
  EXPECT_EQ(ErrorOf("[[a]]\nlr = 1\n").substr(0, 16), ":1: unknown key ");
  EXPECT_EQ(ErrorOf("lr = \n").substr(0, 3), ":1:");
  EXPECT_EQ(ErrorOf(std::string(2 << 20, '#')).substr(0, 11), ": expected ");
  EXPECT_EQ(ErrorOf(std::string(100000, '[')).substr(0, 3), ":1:");

  for (const std::string path : {"/nonexistent/run.toml", "/tmp"}) {
    Program program;
    EXPECT_THROW(program.Parse({"train", "--config=" + path}), Error);
  }
}

TEST_F(RunConfig, ValuesAreCheckedByTheFlags) {
  EXPECT_THROW(Parse("seq_len = 1.5"), CLI::ParseError);
  EXPECT_THROW(Parse("seq_len = \"many\""), CLI::ParseError);
  EXPECT_THROW(Parse("seq_len = -1"), CLI::ParseError);
  Program program;
  const auto origin = program.Parse({"train", "--config", Write("\nseq_len = 3")});
  EXPECT_EQ(origin.at("--seq-len").substr(origin.at("--seq-len").find(".toml")), ".toml:2");
}

TEST_F(RunConfig, LeavesOtherCommandsAlone) {
  Program program;
  const Strings args = {"info", "--config", "/nonexistent"};
  EXPECT_EQ(ExpandRunConfig(program.app, args).args, args);
  EXPECT_TRUE(ExpandRunConfig(program.app, {}).args.empty());
}

TEST_F(RunConfig, ResolvedConfigReadsBackTheSame) {
  for (const Strings& args : std::vector<Strings>{
           {"train"},
           {"train", "--lr", ".25", "--stop", "a,b", "--stop=-c", "--untied", "--max-tokens", "9"},
           {"train", "--name", "2048", "--out-dir", "tab\there \xC3\xA9 'q' \"q\"", "--verbose"},
           {"train", "--lr", "1e-7", "--layers", "2,4", "--seq-len", "0x10", "--max-steps", "5"}}) {
    Program first;
    first.Parse(args);
    const std::string toml = ResolvedConfig(*first.train);
    Program second;
    second.Parse({"train", "--config", Write(toml)});
    EXPECT_TRUE(first.options == second.options) << toml;
    EXPECT_EQ(toml, ResolvedConfig(*second.train));
  }
}

TEST_F(RunConfig, PrintConfigEndsBeforeTheCommand) {
  Program program;
  program.train->get_option("--name")->required();
  bool ran = false;
  program.train->callback([&] { ran = true; });
  testing::internal::CaptureStdout();
  EXPECT_THROW(program.Parse({"train", "--print-config", "--seq-len", "77"}), CLI::Success);
  const std::string out = testing::internal::GetCapturedStdout();
  EXPECT_NE(out.find("# Tokens per row\nseq_len = 77\n"), std::string::npos) << out;
  EXPECT_NE(out.find("tied = true\n"), std::string::npos) << out;
  EXPECT_EQ(out.find("print_config"), std::string::npos) << out;
  EXPECT_FALSE(ran);

  Program other;
  other.train->callback([&] { ran = true; });
  other.Parse({"train"});
  EXPECT_TRUE(ran);
}

TEST(Nearest, FindsWhatWasMeant) {
  EXPECT_EQ(Nearest("--max-step", {"--seq-len", "--max-steps"}), "--max-steps");
  EXPECT_EQ(Nearest("trian", {"info", "train"}), "train");
  EXPECT_EQ(Nearest("quantum", {"info", "train"}), "");
}

}  // namespace
}  // namespace detour::cli
