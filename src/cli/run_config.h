// Run files: a TOML file with the same keys as a subcommand's flags.
//
//   # `detour train --config run.toml --lr 3e-4`: the command line wins over the file.
//   seq_len = 1024            # --seq-len 1024; '-' and '_' are the same
//   layers = [1, 3, 5]        # a list option, or "1,3,5" for an option that takes one string
//   [optimizer]               # sections group for the reader and mean nothing: this is --lr
//   lr = 1e-3
//
// The file is turned into arguments before the command line is parsed, so that names, types and
// ranges have one definition, the flags. To a command an option of the file looks like one that the
// user typed.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace detour::cli {

/// Gives `sub` the options `--config FILE` and `--print-config`. The latter prints
/// ResolvedConfig(sub) and ends with exit code 0 before the subcommand's callback. Uses the
/// subcommand's parse_complete_callback; the command's own work belongs in `callback`. A
/// `--dry-run` is the command's own flag.
void AddRunConfigOptions(CLI::App& sub);

/// An on/off flag such as "--bos,!--no-bos" whose help and resolved configuration know its default,
/// `value`.
CLI::Option* AddFlag(CLI::App& sub, const std::string& names, bool& value, const std::string& help);

struct ExpandedArgs {
  std::vector<std::string> args;  ///< in command-line order, without the program's name
  std::map<std::string, std::string>
      origin;  ///< "--seq-len" → "run.toml:3" for what came from the file
};

/// The arguments with those of a run file added: where they name a subcommand with
/// AddRunConfigOptions and `--config FILE`, each key that the command line does not give itself.
/// Throws Error "cli.run_config" with file and line: no such file, not TOML, unknown key (with the
/// nearest known one), given twice, a value of no use.
ExpandedArgs ExpandRunConfig(CLI::App& app, const std::vector<std::string>& args);

/// After parsing: every option of `sub` with its value, as TOML that reads back to the same; the
/// help texts as comments. Options without a value are comments only, and so are defaults of
/// options that exclude others.
std::string ResolvedConfig(CLI::App& sub);

/// The candidate with the smallest edit distance to `name`, or "" if none is near.
std::string Nearest(std::string_view name, const std::vector<std::string>& candidates);

/// The long names of the options of `app`, each with its "--".
std::vector<std::string> LongFlags(CLI::App& app);

}  // namespace detour::cli
