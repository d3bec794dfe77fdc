// The program: registers the subcommands, and turns whatever they throw into one line and an exit
// code.
#include <fmt/format.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <iostream>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/run_config.h"
#include "core/error.h"

namespace detour::cli {
namespace {

enum ExitCode { kDone = 0, kFailed = 1, kUsage = 2 };

constexpr char kFooter[] =
    "Example: detour prepare --help\n"
    "Exit codes: 0 done; 1 failed (one line on standard error); 2 wrong flags or run file;\n"
    "130 interrupted twice.";

// A file name or a peer's text may hold anything; a message is one line. Libraries append stack
// traces to theirs.
std::string OneLine(std::string text, bool first_line_only) {
  if (first_line_only) text = text.substr(0, text.find('\n'));
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c == 127; }, ' ');
  return text;
}

int PrintError(const std::string& message, ExitCode code) {
  std::cout.flush();
  std::cerr << "detour: error: " << message << std::endl;
  return code;
}

int PrintUsageError(CLI::App& app, const CLI::ParseError& error, const ExpandedArgs& args) {
  std::string message = OneLine(error.what(), false);
  for (const auto& [flag, where] : args.origin) {
    const size_t at = message.find(flag);
    const size_t end = at + flag.size();
    if (at == std::string::npos) continue;
    if (end < message.size() && (std::isalnum(message[end]) || message[end] == '-')) continue;
    message = where + ": " + message;
    break;
  }
  CLI::App* sub = &app;
  std::string command = "detour";
  while (!sub->get_subcommands().empty()) {
    sub = sub->get_subcommands()[0];
    command += " " + sub->get_name();
  }
  const std::vector<std::string> extras = app.remaining(true);
  // A misspelt flag is also why a required one is missing.
  const bool blame_extras = dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr ||
                            dynamic_cast<const CLI::RequiredError*>(&error) != nullptr;
  if (blame_extras && !extras.empty()) {
    std::vector<std::string> known = LongFlags(*sub);
    for (CLI::App* s : sub->get_subcommands(nullptr)) known.push_back(s->get_name());
    const std::string extra = extras[0].substr(0, extras[0].find('='));
    const std::string near = Nearest(extra, known);
    message = fmt::format("unexpected \"{}\".{}", OneLine(extra, false),
                          near.empty() ? "" : fmt::format(" Did you mean \"{}\"?", near));
  }
  if (!message.ends_with('.') && !message.ends_with('?')) message += ".";
  return PrintError(fmt::format("{} Hint: run {} --help", message, command), kUsage);
}

int Run(int argc, char** argv) {
  CLI::App app("Transformers whose tokens choose their own way through the network.", "detour");
  app.option_defaults()->always_capture_default();
  app.set_version_flag("--version", "detour " DETOUR_VERSION);
  app.require_subcommand(0, 1);
  app.footer(kFooter);
  AddTokenizerCommand(app);
  AddPrepareCommand(app);
  AddTrainCommand(app);
  AddEvalCommand(app);
  AddGenerateCommand(app);
  AddChatCommand(app);
  AddLogitsCommand(app);
  AddInfoCommand(app);
  AddConvertCommand(app);
  AddVerifyCommand(app);
  AddReportCommand(app);
  AddRouteCommand(app);

  ExpandedArgs args;
  try {
    args = ExpandRunConfig(app, {argv + 1, argv + argc});
    app.parse(std::vector<std::string>(args.args.rbegin(), args.args.rend()));
  } catch (const CLI::RuntimeError& e) {
    return e.get_exit_code();
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() != 0) return PrintUsageError(app, e, args);
    app.exit(e);  // prints help or version
    return kDone;
  }
  if (app.get_subcommands().empty()) std::cout << app.help();
  return kDone;
}

int Main(int argc, char** argv) {
  // A closed pipe (`detour … | head`) ends the program without a word, also where a parent ignores
  // the signal.
  signal(SIGPIPE, SIG_DFL);
  try {
    const int code = Run(argc, argv);
    std::cout.flush();
    if (!std::cout || fflush(stdout) != 0 || ferror(stdout)) {
      return PrintError("standard output cannot be written", kFailed);
    }
    return code;
  } catch (const Error& e) {
    return PrintError(OneLine(e.what(), false), e.code() == "cli.run_config" ? kUsage : kFailed);
  } catch (const std::bad_alloc&) {
    return PrintError("out of memory", kFailed);
  } catch (const std::logic_error& e) {
    return PrintError("internal error: " + OneLine(e.what(), true), kFailed);
  } catch (const std::exception& e) {
    return PrintError(OneLine(e.what(), true), kFailed);
  }
}

}  // namespace
}  // namespace detour::cli

int main(int argc, char** argv) { return detour::cli::Main(argc, argv); }
