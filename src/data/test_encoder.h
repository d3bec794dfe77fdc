// For tests: a tokenizer that is nothing but a pre-tokenizer. One id per match, its hash, so that
// equal ids mean equal boundaries.
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "data/cuts.h"

namespace detour::data {

inline constexpr int32_t kRegexVocabSize = 1 << 30;

// As in the tokenizer.json of GPT-2, Llama 3 and (o200k) GPT-4o.
inline constexpr char kGpt2Regex[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
inline constexpr char kLlama3Regex[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr char kO200kRegex[] =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

inline EncodeFn RegexEncoder(const std::string& pattern) {
  int error = 0;
  PCRE2_SIZE at = 0;
  const std::shared_ptr<pcre2_code> code(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF, &error, &at, nullptr),
      pcre2_code_free);
  DETOUR_CHECK(code, "error {} at {}", error, at);
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  return [code](std::string_view text) {
    const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> match(
        pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
    std::vector<int32_t> ids;
    size_t done = 0;
    const auto add = [&](size_t end) {
      uint64_t hash = 14695981039346656037u;
      for (const char c : text.substr(done, end - done)) {
        hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
      }
      ids.push_back(1 + static_cast<int32_t>((hash ^ hash >> 32) % (kRegexVocabSize - 1)));
      done = end;
    };
    while (done < text.size() && pcre2_match(code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()),
                                             text.size(), done, 0, match.get(), nullptr) > 0) {
      const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.get());
      if (range[0] > done) add(range[0]);  // what no alternative matches: bytes that are not UTF-8
      add(range[1]);
    }
    if (done < text.size()) add(text.size());
    return ids;
  };
}

}  // namespace detour::data
