// `detour chat`: a conversation in the terminal, or over pipes.
#include "infer/chat.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/line_reader.h"
#include "cli/run_config.h"
#include "cli/signals.h"
#include "convert/load.h"
#include "core/json.h"
#include "io/atomic.h"
#include "report/table.h"
#include "report/terminal.h"

namespace detour::cli {

namespace {

constexpr char kHelp[] =
    "/help         this\n"
    "/reset        forget the conversation, but not the system message\n"
    "/system TEXT  another system message; without TEXT, none\n"
    "/exit         end (so do Ctrl-D, and Ctrl-C where you write)\n"
    "//...         a message that begins with /\n"
    "Ctrl-C while the model answers stops the answer.\n";

struct Options {
  std::string model, system;
  bool json = false, stats = true;
  infer::ConversationOptions conversation;
  std::string weights = "f32";
  RuntimeOptions runtime;
};

/// What a conversation needs of a model.
struct Loaded {
  model::Model model;
  std::unique_ptr<data::Tokenizer> tokenizer;
  data::ChatTemplate chat;
  std::vector<int32_t> eos_ids;
};

/// "eos_token_id": one id or a list of them.
void AddEosIds(const Json& config, const std::string& where, std::vector<int32_t>* ids) {
  if (!HasKey(config, "eos_token_id", where)) return;
  const Json& value = config["eos_token_id"];
  for (const Json& id : value.is_array() ? value : Json::array({value})) {
    if (!id.is_number_integer()) {
      Fail("chat.eos", "{}: eos_token_id: expected an id or a list of ids", where);
    }
    ids->push_back(id.get<int32_t>());
  }
}

Loaded Load(const std::string& path, const std::string& weights) {
  Loaded loaded{.model = convert::LoadModel(path, ServingWeights(weights)),
                .tokenizer = convert::LoadTokenizer(path),
                .chat = convert::LoadChatTemplate(path)};
  AddEosIds(loaded.model.config.extra, path + "/config.json", &loaded.eos_ids);
  const std::string generation = path + "/generation_config.json";
  if (std::filesystem::exists(generation)) {
    AddEosIds(ParseJson(io::ReadFile(generation, 1 << 24), generation), generation,
              &loaded.eos_ids);
  }
  if (const auto id = loaded.tokenizer->eos_id()) loaded.eos_ids.push_back(*id);
  return loaded;
}

class ChatSession {
 public:
  ChatSession(const Options& options, const Loaded& loaded)
      : options_(options),
        conversation_(loaded.model, *loaded.tokenizer, loaded.chat, options.conversation),
        interactive_(isatty(STDIN_FILENO)),
        screen_(isatty(STDOUT_FILENO)) {
    dim_ = report::IsTerminal(stderr) && !std::getenv("NO_COLOR");
  }

  void Run() {
    conversation_.SetSystem(options_.system);  // a template that fails does so here
    LineReader reader(STDIN_FILENO);
    std::string line;
    while (true) {
      Prompt();
      if (reader.Read(&line) != LineReader::Result::kLine) {
        if (interactive_) Show("\n");
        return;
      }
      try {
        if (!Handle(line)) return;
      } catch (const Error& e) {
        // A person can go on; a script would take the next answer for this one.
        if (!interactive_) throw;
        Note(e.what());
      }
    }
  }

 private:
  void Prompt() {
    if (!interactive_) return;
    std::FILE* out = screen_ ? stdout : stderr;
    std::fputs("> ", out);
    std::fflush(out);
  }

  void Show(std::string_view text) {
    const std::string shown = screen_ ? report::Harmless(text) : std::string(text);
    std::fwrite(shown.data(), 1, shown.size(), stdout);
    std::fflush(stdout);
  }

  /// A line beside the conversation.
  void Note(std::string_view text) {
    std::fflush(stdout);
    std::string line = report::Harmless(text);
    std::ranges::replace(line, '\n', ' ');
    if (dim_) line = "\x1b[2m" + line + "\x1b[0m";
    fmt::print(stderr, "{}\n", line);
  }

  /// False: the end.
  bool Handle(const std::string& line) {
    if (line.find_first_not_of(" \t") == std::string::npos) return true;
    if (!line.starts_with('/')) {
      Say(line);
    } else if (line.starts_with("//")) {
      Say(std::string_view(line).substr(1));
    } else {
      return Command(line);
    }
    return true;
  }

  bool Command(const std::string& line) {
    const size_t end = std::min(line.find_first_of(" \t"), line.size());
    const size_t begin = std::min(line.find_first_not_of(" \t", end), line.size());
    const std::string name = line.substr(0, end), text = line.substr(begin);
    if (name == "/exit") return false;
    if (name == "/help") {
      Show(kHelp);
    } else if (name == "/reset") {
      conversation_.Reset();
    } else if (name == "/system") {
      conversation_.SetSystem(text);
    } else {
      Fail("chat.command", "{}: no such command. Hint: /help; a message may begin with //",
           Printable(name, 60));
    }
    return true;
  }

  void Say(std::string_view message) {
    bool at_line_start = true;
    const infer::Reply reply = conversation_.Say(message, [&](std::string_view text) {
      if (!options_.json && !text.empty()) {
        Show(text);
        at_line_start = text.ends_with('\n');
      }
      return !StopRequested();
    });
    if (interactive_) ForgetInterrupt();
    if (options_.json) {
      ShowJson(message, reply);
    } else if (!at_line_start || !interactive_) {
      Show("\n");
    }
    if (reply.num_dropped > 0) {
      Note(fmt::format("the context is full: the oldest {} messages are forgotten",
                       reply.num_dropped));
    }
    if (options_.stats) Note(Stats(reply));
  }

  static void ShowJson(std::string_view message, const infer::Reply& r) {
    const Json line = {{"message", message},
                       {"text", r.text},
                       {"finish_reason", r.finish_reason},
                       {"prompt_tokens", r.prompt},
                       {"tokens", r.tokens},
                       {"reused", r.num_reused},
                       {"dropped_messages", r.num_dropped},
                       {"attended", r.attendance.attended},
                       {"attention_pairs", r.attendance.pairs},
                       {"kv_bytes", r.kv_bytes}};
    fmt::print("{}\n", line.dump(-1, ' ', false, Json::error_handler_t::replace));
    std::fflush(stdout);
  }

  static std::string Stats(const infer::Reply& r) {
    const auto rate = [](int64_t tokens, double seconds) {
      return report::FormatFixed(static_cast<double>(tokens) / std::max(seconds, 1e-9), 1);
    };
    std::string line = fmt::format("{} tokens", report::FormatThousands(std::ssize(r.tokens)));
    if (r.finish_reason != "eos") line += fmt::format(" ({})", r.finish_reason);
    line += fmt::format(" | prefill {} of {} at {} tok/s", r.prefill_tokens, r.prompt.size(),
                        rate(r.prefill_tokens, r.prefill_seconds));
    if (r.decode_tokens > 0) {
      line += fmt::format(" | decode {} tok/s", rate(r.decode_tokens, r.decode_seconds));
    }
    if (r.attendance.pairs > 0) {
      line += fmt::format(" | {} attended", report::FormatPercent(r.attendance.Share()));
    }
    return line + " | KV " + report::FormatBytes(static_cast<double>(r.kv_bytes));
  }

  const Options& options_;
  infer::Conversation conversation_;
  const bool interactive_;  // a person writes
  const bool screen_;       // answers go to a terminal
  bool dim_ = false;
};

void Chat(Options& options) {
  ApplyRuntimeOptions(options.runtime);
  const Loaded loaded = Load(options.model, options.weights);
  options.conversation.eos_ids = loaded.eos_ids;
  if (!loaded.chat.from_model()) {
    fmt::print(stderr, "note: the model has no chat template; using ChatML\n");
    // A tokenizer without ChatML's tokens leaves its end of a turn as text.
    options.conversation.stop.push_back("<|im_end|>");
  }
  InstallStopHandler();
  ChatSession(options, loaded).Run();
}

}  // namespace

void AddChatCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("chat", "Talk with a model");
  infer::ConversationOptions& c = options->conversation;
  sub->add_option("model", options->model, "Model directory with its tokenizer and chat template")
      ->required();
  sub->add_option("--system", options->system, "System message, before all others");
  sub->add_option("-n,--max-new-tokens", c.max_new_tokens, "Tokens per answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  AddSamplingOptions(*sub, &c.sampling);
  sub->add_option("--stop", c.stop, "String that ends an answer; may be given several times")
      ->allow_extra_args(false);
  sub->add_option("--prefill-chunk", c.prefill_chunk,
                  "Prompt tokens per forward pass; changes no token")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  AddFlag(*sub, "--reuse-cache,!--no-reuse-cache", c.reuse_cache,
          "Keep the keys and values of the conversation so far; changes no token");
  AddFlag(*sub, "--stats,!--no-stats", options->stats,
          "Speed, share attending and cache bytes after each answer, on standard error");
  AddFlag(*sub, "--json,!--no-json", options->json,
          "A line of JSON per answer, with token ids, in place of its text");
  AddWeightsOption(*sub, &options->weights);
  AddRuntimeOptions(*sub, &options->runtime);
  sub->footer(
      "Reads messages from standard input, one a line. Ctrl-C stops an answer; /help lists the "
      "commands.\nExample:\n  detour chat models/SmolLM2-135M-Instruct --system \"You are brief.\" "
      "--temp 0.2 --top-p 0.9");
  sub->callback([options] { Chat(*options); });
}

}  // namespace detour::cli
