// detour tokenizer train | encode | decode.
#include "data/tokenizer.h"

#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cli/commands.h"
#include "convert/load.h"
#include "core/error.h"
#include "core/json.h"
#include "data/bpe_trainer.h"
#include "data/documents.h"
#include "report/status.h"
#include "report/table.h"

namespace detour::cli {
namespace {
namespace fs = std::filesystem;

struct TrainFlags {
  data::BpeTrainOptions options;
  std::vector<std::string> inputs;
  std::string out_dir, format = "auto", text_field = "text";
};

struct CodeFlags {
  std::string model;
  bool ids_only = false, add_special = false, plain_special = false, skip_special = false;
  std::vector<int32_t> ids;
};

/// Feeds a trainer and says how far it is.
class TrainSink : public data::DocumentSink {
 public:
  TrainSink(data::BpeTrainer* trainer, double total_bytes, report::StatusLine* status)
      : trainer_(*trainer), total_bytes_(total_bytes), eta_(total_bytes), status_(*status) {}

  void Raw(std::string_view bytes) override {
    num_bytes_ += static_cast<double>(bytes.size());
    eta_.Update(num_bytes_);
    std::string text = report::FormatBytes(num_bytes_);
    if (total_bytes_ > 0) text += " of " + report::FormatBytes(total_bytes_);
    text += fmt::format("  {} distinct words  {:.1f} MB/s",
                        report::FormatCount(static_cast<double>(trainer_.num_distinct_words())),
                        eta_.Rate() / 1e6);
    if (total_bytes_ > 0) text += "  ETA " + report::FormatDuration(eta_.RemainingSeconds());
    status_.Update(text);
  }
  void Text(std::string_view part) override {
    text_bytes_ += static_cast<double>(part.size());
    trainer_.Feed(part);
  }
  void EndDocument() override { trainer_.EndText(); }

  double text_bytes() const { return text_bytes_; }

 private:
  data::BpeTrainer& trainer_;
  double total_bytes_, num_bytes_ = 0, text_bytes_ = 0;
  report::Eta eta_;
  report::StatusLine& status_;
};

// An hour of counting must not end in a folder that cannot be written.
void CheckWritable(const std::string& dir) {
  std::error_code error;
  const bool is_new = fs::create_directories(dir, error);
  if (!error && access(dir.c_str(), W_OK | X_OK) != 0) {
    error = std::error_code(errno, std::generic_category());
  }
  if (error) Fail("cli.tokenizer", "{}: not a folder to write to: {}", dir, error.message());
  if (is_new) fs::remove(dir, error);
}

void ReadStdin(data::DocumentSink* sink) {
  std::vector<char> block(size_t{1} << 20);
  size_t n;
  while ((n = fread(block.data(), 1, block.size(), stdin)) > 0) {
    sink->Raw({block.data(), n});
    sink->Text({block.data(), n});
  }
  if (ferror(stdin)) Fail("cli.tokenizer", "standard input cannot be read");
  sink->EndDocument();
}

void RunTrain(const TrainFlags& flags) {
  CheckWritable(flags.out_dir);
  data::BpeTrainer trainer(flags.options);
  report::StatusLine status;
  data::DocumentOptions documents;
  documents.format = flags.format == "text"    ? data::SourceFormat::kText
                     : flags.format == "jsonl" ? data::SourceFormat::kJsonl
                                               : data::SourceFormat::kAuto;
  documents.text_field = flags.text_field;
  std::vector<std::string> paths;
  for (const std::string& input : flags.inputs) {
    if (input != "-") paths.push_back(input);
  }
  const bool from_stdin = paths.size() < flags.inputs.size();
  if (from_stdin && documents.format == data::SourceFormat::kJsonl) {
    Fail("cli.tokenizer", "standard input is read as text: --format jsonl needs a file");
  }
  const std::vector<data::Source> sources = data::ListSources(
      paths, documents.format, [&](const std::string& note) { status.Print("note: " + note); });
  double total_bytes = 0;
  for (const data::Source& source : sources) total_bytes += static_cast<double>(source.bytes);
  const double start_s = report::MonotonicSeconds();
  TrainSink sink(&trainer, from_stdin ? 0 : total_bytes, &status);
  for (const data::Source& source : sources) data::ReadDocuments(source, documents, sink);
  if (from_stdin) ReadStdin(&sink);
  if (trainer.num_words() == 0) Fail("cli.tokenizer", "the input has no text to train on");
  status.Update(fmt::format("merging {} distinct words",
                            report::FormatThousands(trainer.num_distinct_words())));
  const data::BpeSpec spec = trainer.Train();
  status.Finish();
  data::WriteTokenizerDir(spec, flags.options.special_tokens.at(0), flags.out_dir);
  fmt::print("{} tokens from {} of text ({} words, {} distinct) in {}: {}\n", spec.vocab.size(),
             report::FormatBytes(sink.text_bytes()), report::FormatThousands(trainer.num_words()),
             report::FormatThousands(trainer.num_distinct_words()),
             report::FormatDuration(report::MonotonicSeconds() - start_s), flags.out_dir);
  if (static_cast<int64_t>(spec.vocab.size()) < flags.options.vocab_size) {
    fmt::print("note: the text has no more pairs that occur {} times\n",
               flags.options.min_frequency);
  }
}

std::string StdinText() {
  std::string text;
  char block[1 << 16];
  size_t n;
  while ((n = fread(block, 1, sizeof(block), stdin)) > 0) text.append(block, n);
  if (ferror(stdin)) Fail("cli.tokenizer", "standard input cannot be read");
  return text;
}

// Control characters of an added token would break the lines.
std::string OneLine(const std::string& text) {
  std::string line;
  for (const char c : text) {
    if (static_cast<uint8_t>(c) < ' ' || c == 127) {
      line += fmt::format("\\x{:02x}", static_cast<uint8_t>(c));
    } else {
      line += c;
    }
  }
  return line;
}

void RunEncode(const CodeFlags& flags) {
  const auto tokenizer = convert::LoadTokenizer(flags.model);
  const std::vector<int32_t> ids = tokenizer->Encode(
      StdinText(),
      {.add_special_tokens = flags.add_special, .parse_special = !flags.plain_special});
  std::string out;
  for (const int32_t id : ids) {
    if (flags.ids_only) {
      fmt::format_to(std::back_inserter(out), "{}{}", out.empty() ? "" : " ", id);
    } else {
      fmt::format_to(std::back_inserter(out), "{:>7}  {}\n", id, OneLine(tokenizer->TokenText(id)));
    }
  }
  if (flags.ids_only) out += '\n';
  fwrite(out.data(), 1, out.size(), stdout);
}

std::vector<int32_t> ParseIds(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\r\n";
  std::vector<int32_t> ids;
  while (true) {
    text.remove_prefix(std::min(text.find_first_not_of(kBlanks), text.size()));
    if (text.empty()) return ids;
    const std::string_view word = text.substr(0, text.find_first_of(kBlanks));
    const char* const end = word.data() + word.size();
    int32_t id = 0;
    const auto [stop, error] = std::from_chars(word.data(), end, id);
    if (error != std::errc() || stop != end) {
      Fail("cli.tokenizer", "expected token ids separated by blanks, got \"{}\"", Printable(word));
    }
    ids.push_back(id);
    text.remove_prefix(word.size());
  }
}

void RunDecode(const CodeFlags& flags) {
  const auto tokenizer = convert::LoadTokenizer(flags.model);
  const std::string text =
      tokenizer->Decode(flags.ids.empty() ? ParseIds(StdinText()) : flags.ids, flags.skip_special);
  fwrite(text.data(), 1, text.size(), stdout);
}

void AddTrain(CLI::App& parent) {
  const auto flags = std::make_shared<TrainFlags>();
  data::BpeTrainOptions& options = flags->options;
  CLI::App* command = parent.add_subcommand("train", "Train byte-level BPE on text");
  command
      ->add_option("--input", flags->inputs,
                   "Text files, JSON lines (.jsonl), folders of such files, or - for text from "
                   "standard input")
      ->required();
  command
      ->add_option("--vocab-size", options.vocab_size,
                   "Tokens, the 256 bytes and special tokens included")
      ->check(CLI::Range(257, 1 << 22))
      ->capture_default_str();
  command->add_option("--out-dir", flags->out_dir, "Folder for tokenizer.json")->required();
  command
      ->add_option("--min-frequency", options.min_frequency,
                   "Pairs that occur less often do not become a token")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  command
      ->add_option("--special-tokens", options.special_tokens,
                   "They take the first ids; the first one begins and ends texts")
      ->capture_default_str();
  command->add_option("--format", flags->format, "Of the inputs; auto goes by the file name")
      ->check(CLI::IsMember({"auto", "text", "jsonl"}))
      ->capture_default_str();
  command->add_option("--text-field", flags->text_field, "JSON field that holds the text")
      ->capture_default_str();
  command->footer(
      "Example:\n  detour tokenizer train --input corpus/ --vocab-size 4096 --out-dir tok/");
  command->callback([flags] { RunTrain(*flags); });
}

void AddEncode(CLI::App& parent) {
  const auto flags = std::make_shared<CodeFlags>();
  CLI::App* command =
      parent.add_subcommand("encode", "Text from standard input, exactly, to token ids");
  command
      ->add_option("--model", flags->model,
                   "Folder with tokenizer.json or tokenizer.model, or .gguf")
      ->required();
  command->add_flag("--ids-only", flags->ids_only,
                    "All ids on one line, separated by blanks; otherwise a line per token");
  command->add_flag("--add-special-tokens", flags->add_special,
                    "Begin and end tokens where the tokenizer says so");
  command->add_flag("--no-parse-special", flags->plain_special,
                    "Text that spells a special token (<|endoftext|>, ...) stays text");
  command->footer(
      "Example:\n  printf 'Hello world' | detour tokenizer encode --model tok/ --ids-only");
  command->callback([flags] { RunEncode(*flags); });
}

void AddDecode(CLI::App& parent) {
  const auto flags = std::make_shared<CodeFlags>();
  CLI::App* command = parent.add_subcommand("decode", "Token ids to the bytes they stand for");
  command
      ->add_option("--model", flags->model,
                   "Folder with tokenizer.json or tokenizer.model, or .gguf")
      ->required();
  command->add_option("ids", flags->ids, "Token ids; without any they come from standard input");
  command->add_flag("--skip-special-tokens", flags->skip_special, "Leave special tokens out");
  command->footer("Example:\n  detour tokenizer decode --model tok/ 39 72 294");
  command->callback([flags] { RunDecode(*flags); });
}

}  // namespace

void AddTokenizerCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("tokenizer", "Train a tokenizer; text to ids and back");
  command->require_subcommand(1);
  command->footer("Example:\n  detour tokenizer train --input corpus/ --out-dir tok/");
  AddTrain(*command);
  AddEncode(*command);
  AddDecode(*command);
}

}  // namespace detour::cli
