// The tokenizer and the chat templates in a GGUF file's metadata, read and written.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"
#include "data/bpe_spec.h"
#include "data/gguf_tokenizer.h"
#include "io/gguf.h"

namespace detour::convert {

using GgufMetadata = std::vector<std::pair<std::string, io::GgufData>>;

/// The keys `tokenizer.ggml.…`. Error("io.gguf") for wrong kinds, Error("convert.gguf") if the file
/// has no tokenizer. What they say is checked by data::ReadGgufTokenizer.
data::GgufTokenizer VocabOf(const io::GgufFile& file);

/// A tokenizer_config.json that says of special tokens and chat templates what the file says.
Json TokenizerConfigOf(const io::GgufFile& file);

/// The tokenizer of a directory (tokenizer.json, tokenizer_config.json, chat_template.jinja) as
/// metadata, with `vocab_size` tokens: places behind the last token are filled with unused ones.
/// Error("convert.tokenizer") where the format cannot say what the tokenizer does: read back, the
/// result must cut, merge and frame texts as before.
GgufMetadata VocabToGguf(const std::string& dir, int64_t vocab_size);

/// The keys `tokenizer.…` of a file as they are.
GgufMetadata CopyVocab(const io::GgufFile& file);

}  // namespace detour::convert
