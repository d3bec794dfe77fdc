// Text <-> token ids. One interface over Hugging Face BPE (tokenizer.json), SentencePiece
// (tokenizer.model) and the tokenizer in a GGUF file.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace detour::data {

struct GgufTokenizer;
class TokenShards;

struct EncodeOptions {
  /// Put bos/eos around the text where the tokenizer's post-processor says so.
  bool add_special_tokens = false;
  /// Recognise tokens marked `special` in the text, as Hugging Face does. Off for text that must
  /// not be able to inject one: it is then encoded as ordinary text.
  bool parse_special = true;
};

/// Const methods are thread-safe. Error("data.tokenizer") for every fault of a file or an id.
class Tokenizer {
 public:
  /// `path`: a directory with tokenizer.json or else tokenizer.model, or one such file.
  /// tokenizer_config.json beside it, if any, names bos, eos and pad.
  static std::unique_ptr<Tokenizer> Load(const std::string& path);
  /// From a GGUF file's metadata (gguf_tokenizer.h); `name` is used in messages.
  static std::unique_ptr<Tokenizer> FromGguf(const GgufTokenizer& gguf, const std::string& name);
  virtual ~Tokenizer() = default;

  /// Any bytes. BPE: for valid UTF-8 the ids of the `tokenizers` package; a byte-level vocabulary
  /// with all 256 bytes and no normalizer gives every input back in Decode. Bytes that are not
  /// UTF-8 split the text: each maximal run of them is a pre-token of its own, one token per byte
  /// (byte-level or byte fallback; else the unknown token), and nothing is put in front of the text
  /// behind it.
  std::vector<int32_t> Encode(std::string_view text, const EncodeOptions& options = {}) const {
    return EncodeText(text, options);
  }
  /// The text of `ids`, made as the tokenizer's decoder says; `skip_special` leaves special tokens
  /// out. Bytes that are not UTF-8 stay as they are. An id out of range is an Error.
  std::string Decode(std::span<const int32_t> ids, bool skip_special = false) const {
    return DecodeIds(ids, skip_special);
  }
  /// What a token amid others contributes; may be part of a UTF-8 character (see Utf8Stream).
  virtual std::string DecodeToken(int32_t id) const = 0;
  /// The token as its file spells it ("Ġthe", "▁the", "<|endoftext|>"): for people, not for text.
  virtual std::string TokenText(int32_t id) const = 0;
  /// The id of the token that the file spells so.
  virtual std::optional<int32_t> TokenId(std::string_view text) const = 0;
  virtual bool IsSpecial(int32_t id) const = 0;

  /// Ids are in [0, vocab_size()). A model's embedding may have more rows than that: those rows
  /// have no token.
  int32_t vocab_size() const { return vocab_size_; }
  std::optional<int32_t> bos_id() const { return bos_id_; }
  std::optional<int32_t> eos_id() const { return eos_id_; }
  std::optional<int32_t> pad_id() const { return pad_id_; }
  /// SHA-256 (hex) of the tokenizer file, or of the tokenizer.json that says the same as a GGUF:
  /// names the tokenizer in manifests.
  const std::string& fingerprint() const { return fingerprint_; }

 protected:
  virtual std::vector<int32_t> EncodeText(std::string_view text,
                                          const EncodeOptions& options) const = 0;
  virtual std::string DecodeIds(std::span<const int32_t> ids, bool skip_special) const;
  /// Error unless `id` is in [0, vocab_size()).
  void CheckId(int32_t id) const;

  int32_t vocab_size_ = 0;
  std::optional<int32_t> bos_id_, eos_id_, pad_id_;
  /// What SentencePiece directories say about bos and eos around a text (add_bos_token, …); a
  /// tokenizer.json has its post-processor for that.
  std::optional<bool> add_bos_, add_eos_;

 private:
  void ReadConfig(const std::string& path);
  std::string fingerprint_;
};

/// The tokenizer's files at `path` (a directory, or one file): what to copy to keep it with a
/// model.
std::vector<std::string> TokenizerFiles(const std::string& path);

/// Whether there is a directory `path` with a tokenizer.
bool HasTokenizer(const std::string& path);

/// Error("data.tokenizer") if `shards` were made with a tokenizer of another size than `tokenizer`,
/// that of the model at `model`: such ids mean something else. Costs nothing.
void CheckMadeWith(const TokenShards& shards, const Tokenizer& tokenizer, const std::string& model);

/// BPE from the text of a tokenizer.json; `name` is used in messages.
std::unique_ptr<Tokenizer> LoadTokenizerJson(std::string_view json, const std::string& name);

/// SentencePiece from the bytes of a tokenizer.model; `name` is used in messages.
std::unique_ptr<Tokenizer> LoadSentencePiece(std::string_view model, const std::string& name);

}  // namespace detour::data
