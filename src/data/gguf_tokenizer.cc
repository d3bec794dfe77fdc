#include "data/gguf_tokenizer.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <unordered_map>

#include "core/error.h"
#include "core/json.h"
#include "core/sha256.h"
#include "data/bpe_tokenizer.h"
#include "data/tokenizer_pipeline.h"

namespace detour::data {
namespace {

constexpr size_t kMaxTokens = size_t{1} << 23;
// The ways to cut a piece in two grow with its length, and each is looked up.
constexpr size_t kMaxPieceBytes = 1024;
constexpr size_t kMaxMerges = size_t{1} << 25;
constexpr const char* kMark = "\u2581";

// What follows are the splitters of the models' own tokenizer.json; those of "default" are
// llama.cpp's (src/llama-vocab.cpp).
constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
                               R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|)"
    R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kDefault[] = {
    R"([\p{P}\$\+<=>\^~\|]+)",
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S))", R"(\p{N}+)",
    R"([0-9][0-9][0-9])"};

Json Split(const char* pattern) {
  return {{"type", "Split"},
          {"pattern", {{"Regex", pattern}}},
          {"behavior", "Isolated"},
          {"invert", false}};
}

Json ByteLevel(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

Json Sequence(const char* key, Json parts) { return {{"type", "Sequence"}, {key, parts}}; }

class Reader {
 public:
  Reader(const GgufTokenizer& gguf, const std::string& name) : gguf_(gguf), name_(name) {}

  BpeSpec Read() {
    CheckSizes();
    ReadTokens();
    pipeline_ = {{"normalizer", nullptr}, {"pre_tokenizer", nullptr}};
    if (gguf_.model == "gpt2") {
      ReadGpt2();
    } else if (gguf_.model == "llama") {
      ReadLlama();
    } else {
      Bad("unsupported tokenizer.ggml.model \"{}\"; read here: gpt2, llama",
          Printable(gguf_.model));
    }
    ReadEnds();
    ReadPipeline(pipeline_, name_, &spec_);
    return std::move(spec_);
  }

 private:
  template <typename... Args>
  [[noreturn]] void Bad(fmt::format_string<Args...> format, Args&&... args) const {
    Fail("data.tokenizer", "{}: {}", name_, fmt::format(format, std::forward<Args>(args)...));
  }

  void CheckSizes() const {
    const size_t n = gguf_.tokens.size();
    if (n == 0 || n > kMaxTokens) Bad("{} tokens: expected 1 to {}", n, kMaxTokens);
    if (!gguf_.token_type.empty() && gguf_.token_type.size() != n) {
      Bad("{} token types for {} tokens", gguf_.token_type.size(), n);
    }
    if (!gguf_.scores.empty() && gguf_.scores.size() != n) {
      Bad("{} scores for {} tokens", gguf_.scores.size(), n);
    }
  }

  GgufTokenType TypeOf(size_t id) const {
    return gguf_.token_type.empty() ? GgufTokenType::kNormal
                                    : static_cast<GgufTokenType>(gguf_.token_type[id]);
  }

  // Of two tokens with one spelling the second cannot come out of any text: its place stays empty.
  void ReadTokens() {
    spec_.vocab.resize(gguf_.tokens.size());
    for (size_t i = 0; i < gguf_.tokens.size(); ++i) {
      std::string token = gguf_.tokens[i];
      const int32_t id = static_cast<int32_t>(i);
      if (ValidUtf8Prefix(token) != token.size()) {
        Bad("token {} is not UTF-8: \"{}\"", id, Printable(token));
      }
      const GgufTokenType type = TypeOf(i);
      if (type < GgufTokenType::kNormal || type > GgufTokenType::kByte) {
        Bad("token {} has type {}: expected 1 to 6", id, static_cast<int32_t>(type));
      }
      const bool special = type == GgufTokenType::kControl || type == GgufTokenType::kUnknown;
      if (type == GgufTokenType::kUserDefined) {  // spelled as pieces are, but found in raw text
        const std::string piece = std::exchange(token, "");
        ForEachLiteral(kMark, piece, [&](size_t begin, size_t end, bool is_mark) {
          token += is_mark ? " " : piece.substr(begin, end - begin);
        });
      }
      if (token.empty() || !ids_.emplace(token, id).second) continue;
      spec_.vocab[i] = token;
      if (special || type == GgufTokenType::kUserDefined) {
        spec_.added_tokens.push_back({.id = id, .content = token, .special = special});
      }
    }
    if (ids_.empty()) Bad("all tokens are empty");
  }

  void ReadGpt2() {
    const std::string pre = gguf_.pre.empty() ? "default" : gguf_.pre;
    Json parts = Json::array();
    add_bos_ = false;
    if (pre == "default") {
      for (const char* pattern : kDefault) parts.push_back(Split(pattern));
    } else if (pre == "gpt-2") {
    } else if (pre == "smollm") {
      parts.push_back({{"type", "Digits"}, {"individual_digits", true}});
    } else if (pre == "qwen2") {
      parts.push_back(Split(kQwen2));
      pipeline_["normalizer"] = {{"type", "NFC"}};
    } else if (pre == "llama-bpe" || pre == "tekken") {
      parts.push_back(Split(pre == "tekken" ? kTekken : kLlama3));
      spec_.ignore_merges = add_bos_ = true;
    } else {
      Bad("unsupported tokenizer.ggml.pre \"{}\"; read here: default, gpt-2, llama-bpe, qwen2, "
          "smollm, tekken",
          Printable(pre));
    }
    parts.push_back(ByteLevel(pre == "gpt-2" || pre == "smollm"));
    pipeline_["pre_tokenizer"] = Sequence("pretokenizers", parts);
    pipeline_["decoder"] = ByteLevel(true);
    spec_.unk_id = std::nullopt;
    for (const std::string& line : gguf_.merges) {
      const size_t space = line.find(' ', 1);
      if (space == std::string::npos) Bad("merge \"{}\": expected two tokens", Printable(line));
      const std::string left = line.substr(0, space), right = line.substr(space + 1);
      for (const std::string& token : {left, right, left + right}) {
        if (!ids_.contains(token)) {
          Bad("merge \"{}\": \"{}\" is not a token", Printable(line), Printable(token));
        }
      }
      spec_.merges.emplace_back(ids_[left], ids_[right]);
    }
  }

  void ReadLlama() {
    if (gguf_.scores.empty()) Bad("tokenizer.ggml.scores is missing");
    const bool prefix = gguf_.add_space_prefix.value_or(true);
    add_bos_ = true;
    spec_.byte_fallback = spec_.fuse_unk = true;
    ReadScores();
    spec_.unk_id = Id(gguf_.unknown_token_id, "unknown_token_id");
    for (size_t id = 0; id < gguf_.tokens.size() && !spec_.unk_id; ++id) {
      if (TypeOf(id) == GgufTokenType::kUnknown) spec_.unk_id = static_cast<int32_t>(id);
    }
    if (spec_.unk_id && spec_.vocab[*spec_.unk_id].empty()) spec_.unk_id = std::nullopt;
    const auto replace = [](const char* from, const char* to) -> Json {
      return {{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
    };
    Json normal = Json::array(), decode = Json::array();
    if (prefix) normal.push_back({{"type", "Prepend"}, {"prepend", kMark}});
    normal.push_back(replace(" ", kMark));
    decode.push_back(replace(kMark, " "));
    decode.push_back({{"type", "ByteFallback"}});
    decode.push_back({{"type", "Fuse"}});
    if (prefix) {
      decode.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
    }
    pipeline_["normalizer"] = Sequence("normalizers", normal);
    pipeline_["decoder"] = Sequence("decoders", decode);
  }

  // SentencePiece joins the two neighbours whose text is the piece of the highest score: here,
  // every pair of pieces that spells a third is a merge with that one's rank.
  void ReadScores() {
    std::map<float, int32_t, std::greater<>> rank_of;
    for (const float score : gguf_.scores) {
      if (std::isnan(score)) Bad("a score is not a number");
      rank_of.emplace(score, 0);
    }
    int32_t rank = 0;
    for (auto& [score, place] : rank_of) place = rank++;
    const auto normal = [&](const std::string& text) {
      const auto it = ids_.find(text);
      return it == ids_.end() || TypeOf(it->second) != GgufTokenType::kNormal ? -1 : it->second;
    };
    for (size_t id = 0; id < spec_.vocab.size(); ++id) {
      const std::string& token = spec_.vocab[id];
      if (token.empty() || TypeOf(id) != GgufTokenType::kNormal) continue;
      if (token.size() > kMaxPieceBytes) {
        Bad("token {} has {} bytes: at most {} are read", id, token.size(), kMaxPieceBytes);
      }
      ForEachCharacter(token, [&](uint32_t, size_t, size_t end) {
        if (end == token.size()) return;
        const int32_t left = normal(token.substr(0, end)), right = normal(token.substr(end));
        if (left < 0 || right < 0) return;
        spec_.merges.emplace_back(left, right);
        spec_.merge_ranks.push_back(rank_of[gguf_.scores[id]]);
      });
      if (spec_.merges.size() > kMaxMerges) Bad("more than {} merges", kMaxMerges);
    }
  }

  std::optional<int32_t> Id(const std::optional<int64_t>& id, const char* key) const {
    if (!id) return std::nullopt;
    if (*id < 0 || *id >= static_cast<int64_t>(gguf_.tokens.size())) {
      Bad("{}: {} is not below {} tokens", key, *id, gguf_.tokens.size());
    }
    return static_cast<int32_t>(*id);
  }

  void ReadEnds() {
    spec_.bos_id = Id(gguf_.bos_token_id, "bos_token_id");
    spec_.eos_id = Id(gguf_.eos_token_id, "eos_token_id");
    spec_.pad_id = Id(gguf_.padding_token_id, "padding_token_id");
    Json single = Json::array(), tokens = Json::object();
    const auto add = [&](const std::optional<int32_t>& id, const char* key) {
      if (!id) Bad("add_{}_token without {}_token_id", key, key);
      const std::string& token = gguf_.tokens[*id];
      single.push_back({{"SpecialToken", {{"id", token}, {"type_id", 0}}}});
      tokens[token] = {{"id", token}, {"ids", {*id}}, {"tokens", {token}}};
    };
    // Where the file says nothing, a model without the token goes without.
    if (gguf_.add_bos_token.value_or(add_bos_ && spec_.bos_id)) add(spec_.bos_id, "bos");
    single.push_back({{"Sequence", {{"id", "A"}, {"type_id", 0}}}});
    if (gguf_.add_eos_token.value_or(false)) add(spec_.eos_id, "eos");
    const Json pair = {{{"Sequence", {{"id", "A"}, {"type_id", 0}}}},
                       {{"Sequence", {{"id", "B"}, {"type_id", 1}}}}};
    if (!tokens.empty()) {
      pipeline_["post_processor"] = {{"type", "TemplateProcessing"},
                                     {"single", single},
                                     {"pair", pair},
                                     {"special_tokens", tokens}};
    }
  }

  const GgufTokenizer& gguf_;
  const std::string& name_;
  BpeSpec spec_;
  Json pipeline_;
  bool add_bos_ = false;
  std::unordered_map<std::string, int32_t> ids_;
};

}  // namespace

BpeSpec ReadGgufTokenizer(const GgufTokenizer& gguf, const std::string& name) {
  return Reader(gguf, name).Read();
}

std::unique_ptr<Tokenizer> Tokenizer::FromGguf(const GgufTokenizer& gguf, const std::string& name) {
  BpeSpec spec = ReadGgufTokenizer(gguf, name);
  const std::string json = WriteTokenizerJson(spec);
  auto tokenizer = std::make_unique<BpeTokenizer>(std::move(spec));
  tokenizer->fingerprint_ = Sha256Hex(json);
  return tokenizer;
}

}  // namespace detour::data
