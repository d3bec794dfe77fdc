// The tokenizer made of a tokenizer.json with a BPE model.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "data/bpe_model.h"
#include "data/bpe_spec.h"
#include "data/tokenizer.h"

namespace detour::data {

class BpeTokenizer final : public Tokenizer {
 public:
  /// Requires a spec as ParseTokenizerJson returns it. Error("data.tokenizer") for a pattern that
  /// does not compile, and for two added tokens that are the same text, or none, once normalized.
  explicit BpeTokenizer(BpeSpec spec);
  ~BpeTokenizer() override;

  std::string DecodeToken(int32_t id) const override;
  std::string TokenText(int32_t id) const override;
  std::optional<int32_t> TokenId(std::string_view text) const override;
  bool IsSpecial(int32_t id) const override;

 protected:
  std::vector<int32_t> EncodeText(std::string_view text,
                                  const EncodeOptions& options) const override;
  std::string DecodeIds(std::span<const int32_t> ids, bool skip_special) const override;

 private:
  struct Scratch;
  struct Call;
  std::unique_ptr<Scratch> AcquireScratch() const;

  void AddTokens();
  void EncodeRun(std::string_view run, PieceStart start, Call& call) const;
  void EncodePiece(std::string_view piece, PieceStart start, Call& call) const;
  void EncodeNormalized(std::string_view piece, PieceStart start, Call& call) const;

  BpeSpec spec_;
  BpeModel model_;
  Normalizer normalizer_;
  Pretokenizer pretokenizer_;
  TokenDecoder decoder_;
  AddedTokenFinder raw_finder_, normalized_finder_;
  std::vector<std::string> bytes_;  // by id, amid other tokens
  std::vector<std::string> text_;   // by id: what goes into the decoder if it does not concatenate
  std::vector<bool> special_;       // by id
  std::unordered_map<std::string, int32_t> id_of_added_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Scratch>> free_;  // guarded by mutex_
};

}  // namespace detour::data
