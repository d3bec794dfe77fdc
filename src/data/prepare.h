// Text to packed token shards: what `detour prepare` does.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/cuts.h"
#include "data/documents.h"
#include "data/shards.h"
#include "data/tokenizer.h"

namespace detour::data {

/// A tokenizer as seen from here.
struct TextEncoder {
  EncodeFn encode;
  int32_t vocab_size = 0;
  int32_t eos_id = 0;
  std::string sha256;
};

/// `tokenizer` must outlive the result. Text that spells a special token becomes that token only
/// with `parse_special`. Error("data.prepare") if the tokenizer has no end-of-text token.
TextEncoder EncoderOf(const Tokenizer& tokenizer, bool parse_special);

struct PrepareProgress {
  int64_t bytes = 0, total_bytes = 0;  ///< of the sources
  int64_t documents = 0, tokens = 0;
};

struct PrepareOptions {
  std::vector<std::string> inputs;  ///< files, folders, "-" (at most once)
  std::vector<std::string> copies;  ///< files to keep beside the shards (the tokenizer's)
  std::string out_dir;
  bool overwrite = false;  ///< of a shard folder; nothing else is ever replaced
  DocumentOptions documents;
  double val_fraction = 0.05;  ///< in [0, 1)
  uint64_t seed = 42;
  int64_t shard_tokens = kShardTokens;
  NoteFn note = [](const std::string&) {};
  std::function<void(const PrepareProgress&)> progress = [](const PrepareProgress&) {};
  std::function<bool()> cancelled = [] { return false; };
};

struct PreparePlan {
  std::vector<Source> sources;
  int64_t documents = 0, text_bytes = 0;  ///< not counting empty documents
  int64_t val_documents = 0;
};

/// Writes the shard folder options.out_dir (docs/formats.md, "Token shards"), whole or not at all,
/// and returns its manifest. The bytes written depend on sources, tokenizer and options alone, not
/// on the number of threads. Memory is bounded: batches of 8 MiB of text; documents over 64 KiB are
/// encoded in parts (cuts.h). A megabyte without a safe place to cut is cut at a UTF-8 boundary and
/// `note` told. Errors: Error("data.prepare", "json", "io.read", "io.write"): bad input, no
/// document, nothing to split, cancelled, out_dir in use.
ShardManifest Prepare(const PrepareOptions& options, const TextEncoder& encoder);

/// Reads all input, writes nothing: what Prepare would make of it. Same errors for input and
/// out_dir.
PreparePlan PlanPrepare(const PrepareOptions& options);

}  // namespace detour::data
