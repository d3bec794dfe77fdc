#include "cli/run_config.h"

#include <fmt/format.h>
#include <toml++/toml.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "core/error.h"

namespace detour::cli {
namespace {

using Strings = std::vector<std::string>;

constexpr char kGroup[] = "Run file";
constexpr size_t kMaxFileBytes = 1 << 20;

// Options of `app` and of its option groups, which CLI11 keeps as subcommands without a name.
std::vector<CLI::Option*> AllOptions(CLI::App& app) {
  std::vector<CLI::Option*> options = app.get_options([](const CLI::Option*) { return true; });
  for (CLI::App* group :
       app.get_subcommands([](const CLI::App* sub) { return sub->get_name().empty(); })) {
    const auto more = AllOptions(*group);
    options.insert(options.end(), more.begin(), more.end());
  }
  return options;
}

bool IsFlag(const CLI::Option& option) { return option.get_items_expected_max() == 0; }
bool IsList(const CLI::Option& option) { return option.get_items_expected_max() > 1; }

bool Configurable(const CLI::App& app, const CLI::Option& option) {
  return !option.get_lnames().empty() && &option != app.get_help_ptr() &&
         option.get_group() != kGroup;
}

// A scalar as it would be typed. An integral float is typed without a fraction, so that 1e6 serves
// as a count.
std::optional<std::string> ScalarText(const toml::node& node) {
  if (const auto* v = node.as_string()) return v->get();
  if (const auto* v = node.as_boolean()) return v->get() ? "true" : "false";
  if (const auto* v = node.as_integer()) return fmt::format("{}", v->get());
  if (const auto* v = node.as_floating_point()) {
    const double x = v->get();
    return x == std::trunc(x) && std::fabs(x) < 0x1p53 ? fmt::format("{:.0f}", x)
                                                       : fmt::format("{}", x);
  }
  return std::nullopt;
}

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::string text(kMaxFileBytes + 1, '\0');
  in.read(text.data(), text.size());
  if (in.bad() || (!in && !in.eof())) Fail("cli.run_config", "{}: cannot be read", path);
  text.resize(in.gcount());
  if (text.size() > kMaxFileBytes) {
    Fail("cli.run_config", "{}: expected at most {} bytes. Is it a run file?", path, kMaxFileBytes);
  }
  return text;
}

// One run file on its way to arguments.
class Expansion {
 public:
  Expansion(CLI::App& sub, std::string path, const Strings& user_args)
      : sub_(sub), path_(std::move(path)), user_args_(user_args) {}

  void Run() {
    try {
      AddTable(toml::parse(ReadFile(path_)));
    } catch (const toml::parse_error& e) {
      Fail("cli.run_config", "{}:{}: {}", path_, e.source().begin.line, e.description());
    }
  }

  Strings args;
  std::map<std::string, std::string> origin;

 private:
  void AddTable(const toml::table& table) {
    for (const auto& [key, node] : table) {
      if (const toml::table* section = node.as_table()) {
        AddTable(*section);
      } else {
        Add(std::string(key.str()), fmt::format("{}:{}", path_, key.source().begin.line), node);
      }
    }
  }

  void Add(const std::string& key, const std::string& where, const toml::node& node) {
    std::string flag = "--" + key;
    std::replace(flag.begin(), flag.end(), '_', '-');
    const CLI::Option* option = sub_.get_option_no_throw(flag);
    if (option == nullptr || !Configurable(sub_, *option)) {
      const std::string near = Nearest(flag, KnownFlags());
      Fail("cli.run_config", "{}: unknown key \"{}\".{}", where, key,
           near.empty() ? "" : fmt::format(" Did you mean \"{}\"?", KeyOf(near)));
    }
    const auto [first, is_new] = origin.emplace("--" + option->get_lnames()[0], where);
    if (!is_new) {
      Fail("cli.run_config", "{}: \"{}\" is already set at {}", where, key, first->second);
    }
    if (GivenByUser(*option)) return;
    AddValue(*option, flag, key, where, node);
  }

  void AddValue(const CLI::Option& option, const std::string& flag, const std::string& key,
                const std::string& where, const toml::node& node) {
    Strings values;
    const toml::array* array = node.as_array();
    const size_t num_values = array ? array->size() : 1;
    for (size_t i = 0; i < num_values; ++i) {
      const auto text = ScalarText(array ? *array->get(i) : node);
      if (!text) {
        Fail("cli.run_config", "{}: {}: expected text, a number, true, false or a list of these",
             where, key);
      }
      values.push_back(*text);
    }
    if (values.empty()) {
      Fail("cli.run_config", "{}: {}: expected at least one value. Hint: leave the key out", where,
           key);
    }
    if (IsFlag(option)) {
      if (!node.is_boolean()) Fail("cli.run_config", "{}: {}: expected true or false", where, key);
      args.push_back(flag + "=" + values[0]);
    } else if (IsList(option)) {
      for (const std::string& value : values) AddPair(flag, value);
    } else {
      if (node.is_boolean() && option.get_type_name().find("BOOL") == std::string::npos) {
        Fail("cli.run_config", "{}: {}: expected a value, not true or false", where, key);
      }
      AddPair(flag, fmt::format("{}", fmt::join(values, ",")));
    }
  }

  // CLI11 takes "--name=" for a name whose value follows.
  void AddPair(const std::string& flag, const std::string& value) {
    if (value.empty()) {
      args.insert(args.end(), {flag, value});
    } else {
      args.push_back(flag + "=" + value);
    }
  }

  bool GivenByUser(const CLI::Option& option) const {
    return std::any_of(user_args_.begin(), user_args_.end(), [&](const std::string& arg) {
      if (arg.starts_with("--")) return option.check_lname(arg.substr(2, arg.find('=') - 2));
      return arg.size() > 1 && arg[0] == '-' && option.check_sname(arg.substr(1, 1));
    });
  }

  Strings KnownFlags() const {
    Strings flags;
    for (CLI::Option* option : AllOptions(sub_)) {
      if (!Configurable(sub_, *option)) continue;
      for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
    }
    return flags;
  }

  static std::string KeyOf(const std::string& flag) {
    std::string key = flag.substr(2);
    std::replace(key.begin(), key.end(), '-', '_');
    return key;
  }

  CLI::App& sub_;
  const std::string path_;
  const Strings& user_args_;
};

// Text as a TOML value that ScalarText turns back into the same text or, for a number, into the
// same number.
std::string TomlValue(const std::string& text, const std::string& type_name) {
  const bool numeric = type_name.starts_with("INT") || type_name.starts_with("UINT") ||
                       type_name.starts_with("FLOAT");
  if (!type_name.starts_with("TEXT")) {
    try {
      const toml::table parsed = toml::parse("x = " + text);
      const toml::node& node = *parsed.get("x");
      if (parsed.size() == 1 && node.is_number() && (numeric || ScalarText(node) == text)) {
        return *ScalarText(node);
      }
    } catch (const toml::parse_error&) {
    }
  }
  return nlohmann::json(text).dump();  // a JSON string is a TOML string
}

// A default such as 0 for "no limit" may lie outside the range that is checked where a user gives
// the option.
bool PassesOwnChecks(CLI::Option& option, const std::string& text) {
  for (int i = 0;; ++i) {
    const CLI::Validator* validator = nullptr;
    try {
      validator = option.get_validator(i);
    } catch (const CLI::OptionNotFound&) {
      return true;  // that was all of them
    }
    if (!(*validator)(text).empty()) return false;
  }
}

// The option's values as typed: from the command line or the run file, or else its default.
Strings Values(CLI::Option& option) {
  if (option.count() > 0) {
    const auto& results = option.results();
    return IsList(option) ? results : Strings{results.back()};
  }
  std::string text = option.get_default_str();
  if (!option.get_excludes().empty()) return {};
  if (IsFlag(option)) return {text.empty() ? "false" : text};
  if (text.empty()) return {};
  if (!IsList(option)) return PassesOwnChecks(option, text) ? Strings{text} : Strings{};
  // A list's default is "[1,3]", but "1 3" where libtorch's headers lend std::vector their
  // operator<<.
  if (text.starts_with('[') && text.ends_with(']')) text = text.substr(1, text.size() - 2);
  if (text.empty()) return {};
  return CLI::detail::split(text, text.find(',') == std::string::npos ? ' ' : ',');
}

}  // namespace

void AddRunConfigOptions(CLI::App& sub) {
  sub.add_option("--config", "TOML run file with the same keys as the flags; flags win over it")
      ->type_name("FILE")
      ->group(kGroup);
  const CLI::Option* print =
      sub.add_flag("--print-config")
          ->description("Print the resolved configuration as a run file, and end")
          ->group(kGroup);
  sub.parse_complete_callback([&sub, print] {
    if (print->count() == 0) return;
    std::cout << ResolvedConfig(sub);
    throw CLI::Success();
  });
}

CLI::Option* AddFlag(CLI::App& sub, const std::string& names, bool& value,
                     const std::string& help) {
  return sub.add_flag(names, value, help)->default_str(value ? "true" : "false");
}

ExpandedArgs ExpandRunConfig(CLI::App& app, const std::vector<std::string>& args) {
  ExpandedArgs expanded{args, {}};
  CLI::App* sub = &app;
  size_t first = 0;
  for (; first < args.size(); ++first) {
    const auto next = sub->get_subcommands(
        [&](const CLI::App* s) { return !s->get_name().empty() && s->check_name(args[first]); });
    if (next.empty()) break;
    sub = next[0];
  }
  const CLI::Option* config = sub->get_option_no_throw("--config");
  if (config == nullptr || config->get_group() != kGroup) return expanded;

  const auto end = std::find(args.begin() + first, args.end(), "--") - args.begin();
  Strings user_args(args.begin(), args.begin() + end);
  if (std::find(user_args.begin(), user_args.end(), "--print-config") != user_args.end()) {
    for (CLI::Option* option : AllOptions(*sub)) option->required(false);
  }
  std::string path;
  for (auto arg = user_args.begin() + first; arg != user_args.end(); ++arg) {
    if (arg->starts_with("--config=")) {
      path = arg->substr(9);
      user_args.erase(arg);
      break;
    }
    if (*arg == "--config" && arg + 1 != user_args.end()) {
      path = arg[1];
      user_args.erase(arg, arg + 2);
      break;
    }
  }
  if (path.empty()) return expanded;

  Expansion expansion(*sub, path, user_args);
  expansion.Run();
  // Between the user's options and "--", and --config last: an option that takes a list swallows
  // the positional arguments, or the "--", that follow it.
  expanded.args = std::move(user_args);
  expanded.args.insert(expanded.args.end(), expansion.args.begin(), expansion.args.end());
  expanded.args.push_back("--config=" + path);
  expanded.args.insert(expanded.args.end(), args.begin() + end, args.end());
  expanded.origin = std::move(expansion.origin);
  return expanded;
}

std::string ResolvedConfig(CLI::App& sub) {
  std::string out;
  for (CLI::Option* option : AllOptions(sub)) {
    if (!Configurable(sub, *option) || option->get_group().empty()) continue;
    std::string key = option->get_lnames()[0];
    // Of one run, not of the configuration.
    if (key == "dry-run") continue;
    std::replace(key.begin(), key.end(), '-', '_');

    std::string help = option->get_description();
    std::replace(help.begin(), help.end(), '\n', ' ');
    if (!help.empty()) out += fmt::format("# {}\n", help);
    Strings values = Values(*option);
    if (values.empty()) {
      out += fmt::format("# {} is not set\n\n", key);
      continue;
    }
    if (!IsFlag(*option)) {
      for (std::string& value : values) value = TomlValue(value, option->get_type_name());
    }
    out += IsList(*option) ? fmt::format("{} = [{}]\n\n", key, fmt::join(values, ", "))
                           : fmt::format("{} = {}\n\n", key, values[0]);
  }
  return out;
}

std::string Nearest(std::string_view name, const std::vector<std::string>& candidates) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, name.size() / 3) + 1;
  for (const std::string& candidate : candidates) {
    // Levenshtein, one row at a time.
    std::vector<size_t> row(candidate.size() + 1);
    std::iota(row.begin(), row.end(), 0);
    for (size_t i = 0; i < name.size(); ++i) {
      size_t diagonal = row[0]++;
      for (size_t j = 0; j < candidate.size(); ++j) {
        const size_t substituted = diagonal + (name[i] != candidate[j]);
        diagonal = row[j + 1];
        row[j + 1] = std::min({substituted, row[j] + 1, row[j + 1] + 1});
      }
    }
    if (row.back() < best_distance) {
      best_distance = row.back();
      best = candidate;
    }
  }
  return best;
}

std::vector<std::string> LongFlags(CLI::App& app) {
  Strings flags;
  for (CLI::Option* option : AllOptions(app)) {
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
  }
  return flags;
}

}  // namespace detour::cli
