// From files, folders and standard input to a stream of documents, in bounded memory.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace detour::data {

enum class SourceFormat { kAuto, kText, kJsonl };

struct Source {
  std::string path;                           ///< a regular file
  std::string name;                           ///< in messages and manifests: as the user gave it
  SourceFormat format = SourceFormat::kText;  ///< not kAuto
  int64_t bytes = 0;
};

struct DocumentOptions {
  /// kAuto: .jsonl and .ndjson are JSON lines, everything else is text.
  SourceFormat format = SourceFormat::kAuto;
  std::string text_field = "text";
  /// What parts the documents of a text file and belongs to none of them. "" a file is one
  /// document; "blank-line" lines of white space; "/REGEX/" lines that match REGEX (PCRE2) as a
  /// whole; any other is the literal string, in which \n, \t, \r and \\ stand for newline, tab,
  /// carriage return and backslash.
  std::string separator;
  int64_t max_line_bytes = int64_t{1} << 26;  ///< of one JSON line
};

using NoteFn = std::function<void(const std::string&)>;

/// The files of `inputs` in the order read: an input as given; a folder as its .txt .text .md .rst
/// .jsonl .ndjson files, in all its folders, sorted by path. In a folder a file with a NUL byte in
/// its first 64 KiB is left out and `note` told. Error("data.prepare") if an input is missing or a
/// folder has no such file. Does not accept "-".
std::vector<Source> ListSources(const std::vector<std::string>& inputs, SourceFormat format,
                                const NoteFn& note);

/// SourceFormat of a name by its ending, unless `format` says it.
SourceFormat FormatOf(const std::string& name, SourceFormat format);

/// Receives what ReadDocuments finds, in order.
class DocumentSink {
 public:
  virtual ~DocumentSink() = default;
  /// Bytes of the source as they lie in the file, before any Text made of them.
  virtual void Raw(std::string_view bytes) = 0;
  /// The next part of the current document; a document is the concatenation of its parts.
  virtual void Text(std::string_view part) = 0;
  /// Ends the current document, which may be empty.
  virtual void EndDocument() = 0;
  /// Asked now and then: true ends the reading.
  virtual bool Done() const { return false; }
};

/// Reads one source to its end. Memory: one JSON line or 1 MiB. Error("data.prepare", "json" or
/// "io.read") with name, line or byte: a NUL byte, a line above the maximum, bad JSON, an absent
/// text field.
void ReadDocuments(const Source& source, const DocumentOptions& options, DocumentSink& sink);

/// Reads standard input to its end into the file `path`; returns the number of bytes. `tick` is
/// called for every block and after every signal.
int64_t SpoolStdin(const std::string& path, const std::function<void()>& tick);

}  // namespace detour::data
