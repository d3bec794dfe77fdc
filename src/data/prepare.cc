#include "data/prepare.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <optional>

#include "core/error.h"
#include "core/rng.h"
#include "core/sha256.h"
#include "core/threads.h"
#include "io/atomic.h"

namespace detour::data {
namespace {

namespace fs = std::filesystem;

constexpr size_t kBatchBytes = size_t{1} << 23;
constexpr size_t kPieceBytes = size_t{1} << 16;     // a longer document is encoded in pieces
constexpr size_t kMaxPieceBytes = size_t{1} << 20;  // cut by force

// Which documents are validation; docs/formats.md, "The split".
struct SplitRule {
  double val_fraction = 0;
  uint64_t seed = 0;
  int64_t forced_document = -1;  // validation although the draw says no
  int64_t tail_byte = -1;        // the only document: what follows about here is validation

  bool Drawn(int64_t document) const {
    return document > 0 && Rng(seed, RngPurpose::kSplit).Uniform(document) < val_fraction;
  }
  Split Of(int64_t document) const {
    return Drawn(document) || document == forced_document ? Split::kVal : Split::kTrain;
  }
};

// Counts documents: up to the first that is drawn for validation, or all.
class Counter : public DocumentSink {
 public:
  Counter(const PrepareOptions& options, bool all) : options_(options), all_(all) {
    rule_.val_fraction = options.val_fraction;
    rule_.seed = options.seed;
  }

  void Raw(std::string_view) override {
    if (options_.cancelled()) Fail("data.prepare", "interrupted: nothing was written");
  }
  void Text(std::string_view part) override { document_bytes_ += part.size(); }
  void EndDocument() override {
    if (document_bytes_ == 0) return;
    num_drawn_ += rule_.Drawn(num_documents_);
    ++num_documents_;
    text_bytes_ += document_bytes_;
    document_bytes_ = 0;
  }
  bool Done() const override { return !all_ && num_drawn_ > 0; }

  void Count(const std::vector<Source>& sources) {
    for (const Source& source : sources) {
      if (!Done()) ReadDocuments(source, options_.documents, *this);
    }
    if (num_documents_ == 0) {
      Fail("data.prepare",
           "the input has no text: expected at least one document that is not empty, "
           "got {} files with none",
           sources.size());
    }
  }

  SplitRule Rule() const {
    SplitRule rule = rule_;
    if (rule.val_fraction == 0 || num_drawn_ > 0) return rule;
    if (num_documents_ > 1) {
      rule.forced_document = num_documents_ - 1;
    } else {
      rule.tail_byte = static_cast<int64_t>((1 - rule.val_fraction) * text_bytes_);
      options_.note(
          fmt::format("only one document, so its last {:.1f} % becomes the validation split. Hint: "
                      "--document-separator if it holds several",
                      100 * rule.val_fraction));
    }
    return rule;
  }

  int64_t num_documents() const { return num_documents_; }
  int64_t text_bytes() const { return text_bytes_; }
  int64_t num_val() const { return num_drawn_ > 0 ? num_drawn_ : rule_.val_fraction > 0 ? 1 : 0; }

 private:
  const PrepareOptions& options_;
  const bool all_;
  SplitRule rule_;
  int64_t num_documents_ = 0, num_drawn_ = 0, text_bytes_ = 0, document_bytes_ = 0;
};

// Documents -> pieces -> batches of pieces, encoded in parallel -> shards, in order.
class Packer : public DocumentSink {
 public:
  Packer(const PrepareOptions& options, const TextEncoder& encoder, const SplitRule& rule,
         const std::string& dir, int64_t total_bytes)
      : options_(options),
        encoder_(encoder),
        rule_(rule),
        writers_{{dir, Split::kTrain, encoder.vocab_size, options.shard_tokens},
                 {dir, Split::kVal, encoder.vocab_size, options.shard_tokens}} {
    progress_.total_bytes = total_bytes;
  }

  void Raw(std::string_view bytes) override {
    if (options_.cancelled()) Fail("data.prepare", "interrupted: nothing was written");
    sha_.Update(bytes);
    progress_.bytes += bytes.size();
    options_.progress(progress_);
  }

  void Text(std::string_view part) override {
    while (!part.empty()) {
      size_t n = std::min(part.size(), kPieceBytes);
      if (TailAhead()) n = std::min<size_t>(n, rule_.tail_byte - document_bytes_);
      text_.append(part.substr(0, n));
      part.remove_prefix(n);
      document_bytes_ += n;
      if (TailDue()) next_try_bytes_ = std::min(next_try_bytes_, text_.size() - piece_begin_);
      if (text_.size() - piece_begin_ >= next_try_bytes_) CutPiece();
    }
  }

  void EndDocument() override {
    if (document_bytes_ == 0) return;
    if (rule_.tail_byte >= 0 && num_documents_ == 0) {
      Fail("data.prepare",
           "the only document has {} bytes and no place to cut a validation split from it. "
           "Hint: more text, or --val-fraction 0",
           document_bytes_);
    }
    EndPiece({text_.size(), text_.size()}, true);
  }

  int64_t bytes_read() const { return progress_.bytes; }

  std::string TakeSourceSha256() {
    const std::string hex = sha_.Hex();
    sha_ = Sha256();
    return hex;
  }

  void Finish(ShardManifest* manifest) {
    EncodeBatch();
    SplitInfo* infos[] = {&manifest->train, &manifest->val};
    for (int i = 0; i < 2; ++i) {
      infos_[i].shards = writers_[i].Finish();
      *infos[i] = infos_[i];
    }
    options_.progress(progress_);
    if (num_forced_cuts_ > 0) {
      options_.note(
          fmt::format("{} times {} KiB of text had no word boundary to cut at and were cut at a "
                      "character: a token "
                      "there may differ from that of the whole document",
                      num_forced_cuts_, kMaxPieceBytes >> 10));
    }
  }

 private:
  struct Piece {
    size_t begin, end;  // in text_
    int64_t document;
    bool first, last;        // of its document
    int64_t document_bytes;  // if last
  };

  bool TailAhead() const {
    return rule_.tail_byte >= 0 && num_documents_ == 0 && document_bytes_ < rule_.tail_byte;
  }
  bool TailDue() const {
    return rule_.tail_byte >= 0 && num_documents_ == 0 && document_bytes_ >= rule_.tail_byte;
  }

  // The text since piece_begin_ has become long, or the tail begins about here.
  void CutPiece() {
    const std::string_view piece = std::string_view(text_).substr(piece_begin_);
    // No place found in the text of an earlier try: none is found there now, but in its last bytes.
    const std::optional<Cut> cut = FindCut(piece, searched_bytes_, encoder_.encode);
    if (cut) {
      EndPiece({piece_begin_ + cut->left_end, piece_begin_ + cut->right_begin}, TailDue());
    } else if (piece.size() >= kMaxPieceBytes) {
      ++num_forced_cuts_;
      const size_t at = piece_begin_ + Utf8Boundary(piece, piece.size() - 1);
      EndPiece({at, at}, TailDue());
    } else {
      searched_bytes_ = piece.size() - std::min(piece.size(), kCutContextBytes);
      next_try_bytes_ = std::min(2 * piece.size(), kMaxPieceBytes);
    }
  }

  void EndPiece(Cut cut, bool last) {
    const int64_t after = text_.size() - cut.left_end;  // bytes of the document not in this piece
    pieces_.push_back(
        {piece_begin_, cut.left_end, num_documents_, !in_document_, last, document_bytes_ - after});
    in_document_ = !last;
    piece_begin_ = cut.right_begin;
    searched_bytes_ = 0;
    next_try_bytes_ = kPieceBytes;
    if (last) {
      ++num_documents_;
      document_bytes_ = after;
    }
    if (piece_begin_ >= kBatchBytes) EncodeBatch();
  }

  void EncodeBatch() {
    std::vector<std::vector<int32_t>> ids(pieces_.size());
    ParallelFor(0, pieces_.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Piece& piece = pieces_[i];
        ids[i] =
            encoder_.encode(std::string_view(text_).substr(piece.begin, piece.end - piece.begin));
      }
    });
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const Piece& piece = pieces_[i];
      const bool tail = rule_.tail_byte >= 0 && piece.document > 0;
      const int split = tail || rule_.Of(piece.document) == Split::kVal;
      if (piece.first) writers_[split].BeginDocument();
      if (piece.last) {
        ids[i].push_back(encoder_.eos_id);
        infos_[split].documents += 1;
        infos_[split].text_bytes += piece.document_bytes;
        ++progress_.documents;
      }
      writers_[split].Append(ids[i]);
      infos_[split].tokens += ids[i].size();
      progress_.tokens += ids[i].size();
    }
    pieces_.clear();
    text_.erase(0, piece_begin_);
    piece_begin_ = 0;
  }

  const PrepareOptions& options_;
  const TextEncoder& encoder_;
  const SplitRule rule_;
  ShardWriter writers_[2];
  SplitInfo infos_[2];
  Sha256 sha_;
  PrepareProgress progress_;

  std::string text_;  // pieces of this batch, then the piece that is growing
  std::vector<Piece> pieces_;
  size_t piece_begin_ = 0;     // of the growing piece, in text_
  size_t searched_bytes_ = 0;  // of the growing piece, without finding a cut
  size_t next_try_bytes_ = kPieceBytes;
  bool in_document_ = false;  // the growing piece is not the first of its document
  int64_t document_bytes_ = 0;
  int64_t num_documents_ = 0;  // ended
  int64_t num_forced_cuts_ = 0;
};

void CheckOptions(const PrepareOptions& options) {
  if (options.inputs.empty()) Fail("data.prepare", "expected at least one input, got none");
  if (!(options.val_fraction >= 0 && options.val_fraction < 1)) {
    Fail("data.prepare", "--val-fraction: expected a number in [0, 1), got {}",
         options.val_fraction);
  }
  if (std::count(options.inputs.begin(), options.inputs.end(), "-") > 1) {
    Fail("data.prepare", "expected - (standard input) at most once");
  }
  const std::string& out = options.out_dir;
  std::error_code
      error;  // whatever cannot be looked at cannot be written to either: AtomicDir says so
  if (!fs::exists(out, error) || (fs::is_directory(out, error) && fs::is_empty(out, error))) return;
  if (!fs::exists(out + "/manifest.json", error)) {
    Fail("data.prepare",
         "{}: expected a new, empty or shard folder to write to, got something else", out);
  }
  ReadManifest(out);  // of another program: an error, and nothing is replaced
  if (!options.overwrite) {
    Fail("data.prepare", "{}: holds shards already. Hint: --overwrite replaces them", out);
  }
}

// Standard input is needed twice (to count, to encode), so it becomes a file at `spool`.
std::vector<Source> AllSources(const PrepareOptions& options, const std::string& spool) {
  std::vector<Source> sources;
  for (const std::string& input : options.inputs) {
    if (input != "-") {
      const auto more = ListSources({input}, options.documents.format, options.note);
      sources.insert(sources.end(), more.begin(), more.end());
      continue;
    }
    const int64_t bytes = SpoolStdin(spool, [&] {
      if (options.cancelled()) Fail("data.prepare", "interrupted: nothing was written");
    });
    sources.push_back({spool, "-", FormatOf("", options.documents.format), bytes});
  }
  return sources;
}

}  // namespace

ShardManifest Prepare(const PrepareOptions& options, const TextEncoder& encoder) {
  CheckOptions(options);
  std::error_code error;  // AtomicDir says what is wrong with the parent
  fs::create_directories(fs::path(options.out_dir).parent_path(), error);
  io::AtomicDir dir(options.out_dir);
  const std::string spool = dir.path() + "/stdin";
  const std::vector<Source> sources = AllSources(options, spool);
  Counter counter(options, false);
  counter.Count(sources);

  int64_t total_bytes = 0;
  for (const Source& source : sources) total_bytes += source.bytes;
  Packer packer(options, encoder, counter.Rule(), dir.path(), total_bytes);
  ShardManifest manifest;
  for (const Source& source : sources) {
    const int64_t before = packer.bytes_read();
    ReadDocuments(source, options.documents, packer);
    manifest.sources.push_back(
        {source.name, packer.bytes_read() - before, packer.TakeSourceSha256()});
  }
  packer.Finish(&manifest);
  manifest.vocab_size = encoder.vocab_size;
  manifest.eos_id = encoder.eos_id;
  manifest.tokenizer_sha256 = encoder.sha256;
  manifest.seed = options.seed;
  manifest.val_fraction = options.val_fraction;
  for (const std::string& file : options.copies) {
    io::WriteFile(dir.path() + "/" + fs::path(file).filename().string(), io::ReadFile(file));
  }
  WriteManifest(dir.path(), manifest);
  fs::remove(spool);
  dir.Commit();
  return manifest;
}

PreparePlan PlanPrepare(const PrepareOptions& options) {
  CheckOptions(options);
  const std::string spool =
      (fs::temp_directory_path() / fmt::format("detour-stdin-{}", getpid())).string();
  struct Remove {
    const std::string& path;
    ~Remove() {
      std::error_code ignored;
      fs::remove(path, ignored);
    }
  } remove{spool};
  PreparePlan plan;
  plan.sources = AllSources(options, spool);
  Counter counter(options, true);
  counter.Count(plan.sources);
  plan.documents = counter.num_documents();
  plan.text_bytes = counter.text_bytes();
  plan.val_documents = counter.num_val();
  return plan;
}

TextEncoder EncoderOf(const Tokenizer& tokenizer, bool parse_special) {
  if (!tokenizer.eos_id()) {
    Fail("data.prepare",
         "the tokenizer has no end-of-text token, which ends every document. Hint: name one as "
         "eos_token in "
         "tokenizer_config.json");
  }
  const EncodeOptions options = {.add_special_tokens = false, .parse_special = parse_special};
  return {[&tokenizer, options](std::string_view text) { return tokenizer.Encode(text, options); },
          tokenizer.vocab_size(), *tokenizer.eos_id(), tokenizer.fingerprint()};
}

}  // namespace detour::data
