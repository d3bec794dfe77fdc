#include "data/documents.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <filesystem>
#include <memory>
#include <span>
#include <utility>

#include "core/error.h"
#include "core/json.h"
#include "io/posix.h"

namespace detour::data {
namespace {

namespace fs = std::filesystem;

constexpr size_t kBlockBytes = size_t{1} << 20;
constexpr size_t kBinaryProbeBytes = size_t{1} << 16;
constexpr size_t kMaxSeparatorLineBytes = size_t{1} << 16;
constexpr std::array<std::string_view, 6> kTextEndings = {".txt", ".text",  ".md",
                                                          ".rst", ".jsonl", ".ndjson"};

std::string Ending(const std::string& name) {
  std::string ending = fs::path(name).extension().string();
  for (char& c : ending) {
    if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
  }
  return ending;
}

// Fills `buffer` as far as the file goes; fewer bytes only at its end.
size_t ReadSome(int fd, const std::string& name, std::span<char> buffer) {
  size_t size = 0;
  while (size < buffer.size()) {
    const ssize_t n = read(fd, buffer.data() + size, buffer.size() - size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) io::FailErrno("io.read", name, "read");
    if (n == 0) break;
    size += n;
  }
  return size;
}

bool LooksBinary(const std::string& path) {
  struct stat info;
  const io::Fd fd = io::Fd::OpenRegular(path, &info);
  std::string head(kBinaryProbeBytes, '\0');
  head.resize(ReadSome(fd.get(), path, head));
  return head.find('\0') != std::string::npos;
}

Source FileSource(const std::string& path, SourceFormat format) {
  struct stat info;
  io::Fd::OpenRegular(path, &info);
  return {path, path, FormatOf(path, format), info.st_size};
}

void ListFolder(const std::string& folder, SourceFormat format, const NoteFn& note,
                std::vector<Source>* sources) {
  std::vector<std::string> paths;
  int64_t num_others = 0;
  std::error_code error;
  fs::recursive_directory_iterator it(folder, error);
  for (; !error && it != fs::recursive_directory_iterator(); it.increment(error)) {
    std::error_code unreadable;  // a dangling link, say
    if (!it->is_regular_file(unreadable)) continue;
    const std::string path = it->path().string();
    if (std::find(kTextEndings.begin(), kTextEndings.end(), Ending(path)) == kTextEndings.end()) {
      ++num_others;
    } else {
      paths.push_back(path);
    }
  }
  if (error) Fail("data.prepare", "{}: cannot list the folder: {}", folder, error.message());
  std::sort(paths.begin(), paths.end());
  const size_t before = sources->size();
  for (const std::string& path : paths) {
    if (LooksBinary(path)) {
      note(fmt::format("{}: left out: a NUL byte in it, so not text", path));
    } else {
      sources->push_back(FileSource(path, format));
    }
  }
  if (num_others > 0) {
    note(fmt::format("{}: left out {} files whose names do not end in {}", folder, num_others,
                     fmt::join(kTextEndings, " ")));
  }
  if (sources->size() == before) {
    Fail("data.prepare",
         "{}: no text file in this folder. Hint: files end in {}, or are named one by one", folder,
         fmt::join(kTextEndings, " "));
  }
}

// Calls `fn` with each complete line, newline included, and at Finish with the rest. The caller
// bounds pending_bytes().
class Lines {
 public:
  template <typename Fn>
  void Add(std::string_view block, const Fn& fn) {
    while (!block.empty()) {
      const size_t newline = block.find('\n');
      const size_t n = newline == std::string_view::npos ? block.size() : newline + 1;
      if (newline == std::string_view::npos || !carry_.empty()) {
        carry_.append(block.substr(0, n));
        if (newline != std::string_view::npos) {
          fn(carry_);
          carry_.clear();
          if (carry_.capacity() > kBlockBytes) carry_.shrink_to_fit();
        }
      } else {
        fn(block.substr(0, n));
      }
      block.remove_prefix(n);
    }
  }
  template <typename Fn>
  void Finish(const Fn& fn) {
    if (!carry_.empty()) fn(carry_);
    carry_.clear();
  }
  size_t pending_bytes() const { return carry_.size(); }

 private:
  std::string carry_;
};

class Splitter {
 public:
  virtual ~Splitter() = default;
  virtual void Block(std::string_view block) = 0;
  virtual void Finish() = 0;
};

class WholeFile : public Splitter {
 public:
  explicit WholeFile(DocumentSink& sink) : sink_(sink) {}
  void Block(std::string_view block) override { sink_.Text(block); }
  void Finish() override { sink_.EndDocument(); }

 private:
  DocumentSink& sink_;
};

class LiteralSplitter : public Splitter {
 public:
  LiteralSplitter(std::string separator, DocumentSink& sink)
      : separator_(std::move(separator)), sink_(sink) {}

  void Block(std::string_view block) override {
    carry_.append(block);
    size_t begin = 0;
    for (size_t at; (at = carry_.find(separator_, begin)) != std::string::npos;
         begin = at + separator_.size()) {
      sink_.Text(std::string_view(carry_).substr(begin, at - begin));
      sink_.EndDocument();
    }
    // A separator may have begun in the last bytes.
    const size_t keep = std::min(carry_.size() - begin, separator_.size() - 1);
    sink_.Text(std::string_view(carry_).substr(begin, carry_.size() - begin - keep));
    carry_.erase(0, carry_.size() - keep);
  }

  void Finish() override {
    sink_.Text(carry_);
    sink_.EndDocument();
  }

 private:
  const std::string separator_;
  DocumentSink& sink_;
  std::string carry_;
};

class RegexSplitter : public Splitter {
 public:
  RegexSplitter(const std::string& regex, DocumentSink& sink) : sink_(sink) {
    int code = 0;
    PCRE2_SIZE at = 0;
    regex_.reset(
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(regex.data()), regex.size(),
                      PCRE2_ANCHORED | PCRE2_ENDANCHORED | PCRE2_UTF | PCRE2_MATCH_INVALID_UTF,
                      &code, &at, nullptr));
    if (!regex_) {
      Fail("data.prepare", "--document-separator /{}/: {} at character {}", Printable(regex),
           Message(code), at);
    }
    pcre2_jit_compile(regex_.get(), PCRE2_JIT_COMPLETE);  // without it matching is only slower
    match_.reset(pcre2_match_data_create_from_pattern(regex_.get(), nullptr));
  }

  void Block(std::string_view block) override {
    // Slices, so that a line without end does not grow: a longer one is no separator and its parts
    // are just text.
    for (; !block.empty(); block.remove_prefix(std::min(block.size(), kMaxSeparatorLineBytes))) {
      lines_.Add(block.substr(0, kMaxSeparatorLineBytes), [this](auto line) { Line(line); });
      if (lines_.pending_bytes() > kMaxSeparatorLineBytes) {
        lines_.Finish([this](auto part) { sink_.Text(part); });
        in_long_line_ = true;
      }
    }
  }

  void Finish() override {
    lines_.Finish([this](auto line) { Line(line); });
    sink_.EndDocument();
  }

 private:
  static std::string Message(int code) {
    char text[256];
    pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(text), sizeof(text));
    return text;
  }

  void Line(std::string_view line) {
    if (!std::exchange(in_long_line_, false) && Matches(line)) {
      sink_.EndDocument();
    } else {
      sink_.Text(line);
    }
  }

  bool Matches(std::string_view line) {
    if (line.ends_with('\n')) line.remove_suffix(1);
    if (line.ends_with('\r')) line.remove_suffix(1);
    const int rc = pcre2_match(regex_.get(), reinterpret_cast<PCRE2_SPTR>(line.data()), line.size(),
                               0, 0, match_.get(), nullptr);
    if (rc < 0 && rc != PCRE2_ERROR_NOMATCH) {
      Fail("data.prepare", "--document-separator: {} on the line {}", Message(rc), Printable(line));
    }
    return rc > 0;
  }

  struct Free {
    void operator()(pcre2_code* p) const { pcre2_code_free(p); }
    void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  };
  DocumentSink& sink_;
  std::unique_ptr<pcre2_code, Free> regex_;
  std::unique_ptr<pcre2_match_data, Free> match_;
  Lines lines_;
  bool in_long_line_ = false;
};

class JsonlSplitter : public Splitter {
 public:
  JsonlSplitter(const std::string& name, const DocumentOptions& options, DocumentSink& sink)
      : name_(name), options_(options), sink_(sink) {}

  void Block(std::string_view block) override {
    lines_.Add(block, [this](auto line) { Line(line); });
    CheckLength(lines_.pending_bytes());
  }

  void Finish() override {
    lines_.Finish([this](auto line) { Line(line); });
  }

 private:
  void CheckLength(size_t bytes) const {
    if (bytes > options_.max_line_bytes) {
      Fail("data.prepare",
           "{}, line {}: expected at most {} bytes in a line, got more. Hint: --max-line-mb, or "
           "give this text as a plain file",
           name_, num_lines_ + 1, options_.max_line_bytes);
    }
  }

  void Line(std::string_view line) {
    CheckLength(line.size());
    ++num_lines_;
    if (line.find_first_not_of(" \t\r\n") == std::string_view::npos) return;
    const std::string where = fmt::format("{}, line {}", name_, num_lines_);
    const Json json = ParseJson(line, where);
    if (!json.is_object() || !json.contains(options_.text_field)) {
      Fail("data.prepare",
           "{}: expected an object with the field \"{}\", got none. Hint: --text-field", where,
           Printable(options_.text_field));
    }
    const Json& text = json[options_.text_field];
    if (!text.is_string()) {
      Fail("data.prepare", "{}: expected a string in the field \"{}\", got {}", where,
           Printable(options_.text_field), text.type_name());
    }
    sink_.Text(text.get_ref<const std::string&>());
    sink_.EndDocument();
  }

  const std::string& name_;
  const DocumentOptions& options_;
  DocumentSink& sink_;
  Lines lines_;
  int64_t num_lines_ = 0;
};

std::string Unescape(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\' || i + 1 == text.size()) {
      out += text[i];
      continue;
    }
    const char c = text[++i];
    if (c == 'n') {
      out += '\n';
    } else if (c == 't') {
      out += '\t';
    } else if (c == 'r') {
      out += '\r';
    } else if (c == '\\') {
      out += '\\';
    } else {
      Fail("data.prepare", "--document-separator: expected \\n, \\t, \\r or \\\\, got \\{}",
           Printable({&c, 1}));
    }
  }
  return out;
}

std::unique_ptr<Splitter> MakeSplitter(const Source& source, const DocumentOptions& options,
                                       DocumentSink& sink) {
  const std::string& separator = options.separator;
  if (source.format == SourceFormat::kJsonl) {
    return std::make_unique<JsonlSplitter>(source.name, options, sink);
  }
  if (separator.empty()) return std::make_unique<WholeFile>(sink);
  if (separator == "blank-line") return std::make_unique<RegexSplitter>("[ \\t]*", sink);
  if (separator.size() > 2 && separator.front() == '/' && separator.back() == '/') {
    return std::make_unique<RegexSplitter>(separator.substr(1, separator.size() - 2), sink);
  }
  return std::make_unique<LiteralSplitter>(Unescape(separator), sink);
}

}  // namespace

SourceFormat FormatOf(const std::string& name, SourceFormat format) {
  if (format != SourceFormat::kAuto) return format;
  const std::string ending = Ending(name);
  return ending == ".jsonl" || ending == ".ndjson" ? SourceFormat::kJsonl : SourceFormat::kText;
}

std::vector<Source> ListSources(const std::vector<std::string>& inputs, SourceFormat format,
                                const NoteFn& note) {
  std::vector<Source> sources;
  for (const std::string& input : inputs) {
    std::error_code error;  // FileSource says what is wrong
    if (fs::is_directory(input, error)) {
      ListFolder(input, format, note, &sources);
    } else {
      sources.push_back(FileSource(input, format));
    }
  }
  return sources;
}

void ReadDocuments(const Source& source, const DocumentOptions& options, DocumentSink& sink) {
  struct stat info;
  const io::Fd fd = io::Fd::OpenRegular(source.path, &info);
  const std::unique_ptr<Splitter> splitter = MakeSplitter(source, options, sink);
  std::string buffer(kBlockBytes, '\0');
  int64_t offset = 0;
  while (!sink.Done()) {
    const std::string_view block(buffer.data(), ReadSome(fd.get(), source.name, buffer));
    if (block.empty()) {
      splitter->Finish();
      return;
    }
    if (const size_t nul = block.find('\0'); nul != std::string_view::npos) {
      Fail("data.prepare",
           "{}: expected text, got a NUL byte at byte {}. Hint: is it binary, packed or UTF-16?",
           source.name, offset + static_cast<int64_t>(nul));
    }
    offset += block.size();
    sink.Raw(block);
    splitter->Block(block);
  }
}

int64_t SpoolStdin(const std::string& path, const std::function<void()>& tick) {
  io::FileWriter file(path);
  std::string buffer(kBlockBytes, '\0');
  int64_t bytes = 0;
  for (;;) {
    // poll, since a signal handler may let read start again: a person who presses Ctrl-C is not to
    // wait for input.
    pollfd ready = {STDIN_FILENO, POLLIN, 0};
    const ssize_t n =
        poll(&ready, 1, -1) < 0 ? -1 : read(STDIN_FILENO, buffer.data(), buffer.size());
    if (n < 0 && errno != EINTR) io::FailErrno("io.read", "standard input", "read");
    tick();
    if (n < 0) continue;
    if (n == 0) break;
    file.Write(std::as_bytes(std::span(buffer.data(), static_cast<size_t>(n))));
    bytes += n;
  }
  file.Finish();
  return bytes;
}

}  // namespace detour::data
