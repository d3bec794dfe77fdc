#include "convert/gguf_vocab.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <tuple>

#include "core/error.h"
#include "data/chat_template.h"
#include "data/tokenizer.h"
#include "data/utf8.h"
#include "io/atomic.h"

namespace detour::convert {
namespace {
namespace fs = std::filesystem;
using data::BpeSpec;
using data::GgufTokenizer;
using data::GgufTokenType;

constexpr int64_t kMaxFileBytes = int64_t{1} << 28;
constexpr const char* kHint = "Hint: --no-tokenizer leaves it out";

std::string Ggml(const char* name) { return std::string("tokenizer.ggml.") + name; }

std::optional<int64_t> IntIfThere(const io::GgufFile& file, const char* name) {
  if (!file.HasKey(Ggml(name))) return std::nullopt;
  return file.GetInt(Ggml(name));
}

std::optional<bool> BoolIfThere(const io::GgufFile& file, const char* name) {
  if (!file.HasKey(Ggml(name))) return std::nullopt;
  return file.GetBool(Ggml(name));
}

std::string TemplateText(const io::GgufFile& file, const std::string& key) {
  std::string text = file.GetString(key);
  if (data::ValidUtf8Prefix(text) != text.size()) {
    Fail("convert.gguf", "{}: {}: expected UTF-8", file.path(), Printable(key));
  }
  return text;
}

// --- Writing

/// The steps of a component, without sequences in sequences.
std::vector<Json> Steps(const Json& component, const char* parts) {
  if (component.is_null()) return {};
  if (!component.contains(parts)) return {component};
  std::vector<Json> steps;
  for (const Json& part : component[parts]) {
    for (Json& step : Steps(part, parts)) steps.push_back(std::move(step));
  }
  return steps;
}

bool SameCuts(const BpeSpec& a, const BpeSpec& b) {
  const auto fields = [](const data::PretokenStep& s) {
    return std::tie(s.add_prefix_space, s.metaspace, s.pattern, s.separator, s.behavior, s.invert,
                    s.byte_characters);
  };
  return std::equal(a.pretokenize.begin(), a.pretokenize.end(), b.pretokenize.begin(),
                    b.pretokenize.end(),
                    [&](const auto& x, const auto& y) { return fields(x) == fields(y); });
}

bool SameNormalizer(const BpeSpec& a, const BpeSpec& b) {
  return Steps(ParseJson(a.normalizer_json, "normalizer"), "normalizers") ==
         Steps(ParseJson(b.normalizer_json, "normalizer"), "normalizers");
}

/// Writes one tokenizer.json.
class Writer {
 public:
  Writer(const std::string& dir, int64_t vocab_size)
      : dir_(dir), name_(dir + "/tokenizer.json"), vocab_size_(vocab_size) {
    if (!fs::exists(name_)) {
      Bad("only tokenizer.json can be written to a GGUF file, and there is none");
    }
    spec_ = data::ParseTokenizerJson(io::ReadFile(name_, kMaxFileBytes), name_);
    if (!spec_.byte_level) Bad("only byte-level BPE can be written to a GGUF file");
  }

  GgufMetadata Write() {
    gguf_.model = "gpt2";
    gguf_.pre = FindPre();
    AddTokens();
    for (const auto& [left, right] : spec_.merges) {
      gguf_.merges.push_back(spec_.vocab[left] + " " + spec_.vocab[right]);
    }
    AddEnds();
    Check(data::ReadGgufTokenizer(gguf_, name_));
    return Metadata();
  }

 private:
  template <typename... Args>
  [[noreturn]] void Bad(fmt::format_string<Args...> format, Args&&... args) const {
    Fail("convert.tokenizer", "{}: {}. {}", name_, fmt::format(format, std::forward<Args>(args)...),
         kHint);
  }

  /// The name of what cuts texts as this tokenizer does.
  std::string FindPre() const {
    for (const char* pre : {"gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "default"}) {
      const BpeSpec named =
          data::ReadGgufTokenizer({.model = "gpt2", .pre = pre, .tokens = {"a"}}, name_);
      if (SameCuts(named, spec_) && SameNormalizer(named, spec_) &&
          named.ignore_merges == spec_.ignore_merges) {
        return pre;
      }
    }
    Bad("its normalizer and pre_tokenizer have no name in GGUF files that is known here");
  }

  void AddTokens() {
    std::map<int32_t, const data::AddedToken*> added;
    int64_t num_tokens = std::ssize(spec_.vocab);
    for (const data::AddedToken& token : spec_.added_tokens) {
      if (token.single_word || token.lstrip || token.rstrip ||
          (token.normalized && !spec_.normalize.empty())) {
        Bad("token {} (\"{}\") is found by rules that GGUF files cannot hold", token.id,
            Printable(token.content));
      }
      added[token.id] = &token;
      num_tokens = std::max<int64_t>(num_tokens, token.id + 1);
    }
    if (num_tokens > vocab_size_) Bad("{} tokens, the model has {}", num_tokens, vocab_size_);
    for (int32_t id = 0; id < vocab_size_; ++id) {
      const auto it = added.find(id);
      std::string text = id < std::ssize(spec_.vocab) ? spec_.vocab[id] : "";
      GgufTokenType type = GgufTokenType::kNormal;
      if (it != added.end()) {
        text = it->second->content;
        type = it->second->special ? GgufTokenType::kControl : GgufTokenType::kUserDefined;
      } else if (text.empty()) {
        text = fmt::format("[PAD{}]", id);
        type = GgufTokenType::kUnused;
      }
      gguf_.tokens.push_back(std::move(text));
      gguf_.token_type.push_back(static_cast<int32_t>(type));
    }
  }

  void AddEnds() {
    const auto tokenizer = data::Tokenizer::Load(dir_);
    gguf_.bos_token_id = tokenizer->bos_id();
    gguf_.eos_token_id = tokenizer->eos_id();
    gguf_.padding_token_id = tokenizer->pad_id();
    gguf_.unknown_token_id = spec_.unk_id;
    gguf_.add_bos_token = AddsOne(spec_.prefix_ids, "before", &gguf_.bos_token_id);
    gguf_.add_eos_token = AddsOne(spec_.suffix_ids, "behind", &gguf_.eos_token_id);
  }

  bool AddsOne(const std::vector<int32_t>& ids, const char* where,
               std::optional<int64_t>* id) const {
    if (ids.empty()) return false;
    if (ids.size() > 1 || (*id && **id != ids[0])) {
      Bad("it puts other tokens {} a text than bos and eos", where);
    }
    *id = ids[0];
    return true;
  }

  void Check(const BpeSpec& read) const {
    if (read.merges != spec_.merges || !spec_.merge_ranks.empty() ||
        read.prefix_ids != spec_.prefix_ids || read.suffix_ids != spec_.suffix_ids) {
      Bad("what a GGUF file can hold of it is not the same tokenizer");
    }
  }

  GgufMetadata Metadata() const {
    GgufMetadata out = {{Ggml("model"), gguf_.model},
                        {Ggml("pre"), gguf_.pre},
                        {Ggml("tokens"), gguf_.tokens},
                        {Ggml("token_type"), gguf_.token_type},
                        {Ggml("merges"), gguf_.merges}};
    const auto add = [&](const char* key, const std::optional<int64_t>& id) {
      if (id) out.emplace_back(Ggml(key), static_cast<uint32_t>(*id));
    };
    add("bos_token_id", gguf_.bos_token_id);
    add("eos_token_id", gguf_.eos_token_id);
    add("unknown_token_id", gguf_.unknown_token_id);
    add("padding_token_id", gguf_.padding_token_id);
    out.emplace_back(Ggml("add_bos_token"), *gguf_.add_bos_token);
    out.emplace_back(Ggml("add_eos_token"), *gguf_.add_eos_token);
    AddTemplates(&out);
    return out;
  }

  void AddTemplates(GgufMetadata* out) const {
    std::vector<std::string> names;
    for (const auto& [name, text] : data::ReadChatTemplates(dir_).texts) {
      if (name == "default") {
        out->emplace_back("tokenizer.chat_template", text);
      } else {
        names.push_back(name);
        out->emplace_back("tokenizer.chat_template." + name, text);
      }
    }
    if (!names.empty()) out->emplace_back("tokenizer.chat_templates", names);
  }

  const std::string dir_, name_;
  const int64_t vocab_size_;
  BpeSpec spec_;
  GgufTokenizer gguf_;
};

}  // namespace

GgufTokenizer VocabOf(const io::GgufFile& file) {
  if (!file.HasKey(Ggml("model"))) {
    Fail("convert.gguf", "{}: {} is missing: the file has no tokenizer", file.path(),
         Ggml("model"));
  }
  GgufTokenizer out;
  out.model = file.GetString(Ggml("model"));
  out.pre = file.GetStringOr(Ggml("pre"), "");
  out.tokens = file.GetStrings(Ggml("tokens"));
  if (file.HasKey(Ggml("scores"))) {
    for (const double score : file.GetDoubles(Ggml("scores"))) {
      out.scores.push_back(static_cast<float>(score));
    }
  }
  if (file.HasKey(Ggml("token_type"))) {
    for (const int64_t type : file.GetInts(Ggml("token_type"))) {
      out.token_type.push_back(static_cast<int32_t>(std::clamp<int64_t>(type, -1, 1 << 20)));
    }
  }
  if (file.HasKey(Ggml("merges"))) out.merges = file.GetStrings(Ggml("merges"));
  out.bos_token_id = IntIfThere(file, "bos_token_id");
  out.eos_token_id = IntIfThere(file, "eos_token_id");
  out.unknown_token_id = IntIfThere(file, "unknown_token_id");
  out.padding_token_id = IntIfThere(file, "padding_token_id");
  out.add_bos_token = BoolIfThere(file, "add_bos_token");
  out.add_eos_token = BoolIfThere(file, "add_eos_token");
  out.add_space_prefix = BoolIfThere(file, "add_space_prefix");
  return out;
}

Json TokenizerConfigOf(const io::GgufFile& file) {
  const GgufTokenizer vocab = VocabOf(file);
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"clean_up_tokenization_spaces", false}};
  const auto add = [&](const char* key, const std::optional<int64_t>& id) {
    if (!id || *id < 0 || *id >= std::ssize(vocab.tokens)) return;
    const std::string& token = vocab.tokens[*id];
    if (!token.empty() && data::ValidUtf8Prefix(token) == token.size()) config[key] = token;
  };
  add("bos_token", vocab.bos_token_id);
  add("eos_token", vocab.eos_token_id);
  add("unk_token", vocab.unknown_token_id);
  add("pad_token", vocab.padding_token_id);
  if (!file.HasKey("tokenizer.chat_template")) return config;
  const std::string text = TemplateText(file, "tokenizer.chat_template");
  config["chat_template"] = text;
  if (!file.HasKey("tokenizer.chat_templates")) return config;
  Json all = {{{"name", "default"}, {"template", text}}};
  for (const std::string& name : file.GetStrings("tokenizer.chat_templates")) {
    if (name == "default") continue;
    all.push_back(
        {{"name", name}, {"template", TemplateText(file, "tokenizer.chat_template." + name)}});
  }
  config["chat_template"] = all;
  return config;
}

GgufMetadata VocabToGguf(const std::string& dir, int64_t vocab_size) {
  return Writer(dir, vocab_size).Write();
}

GgufMetadata CopyVocab(const io::GgufFile& file) {
  GgufMetadata out;
  for (const auto& [key, value] : file.metadata()) {
    if (!key.starts_with("tokenizer.")) continue;
    using io::GgufKind;
    if (value.kind() == GgufKind::kString) {
      out.emplace_back(key, file.GetString(key));
    } else if (value.kind() == GgufKind::kBool) {
      out.emplace_back(key, file.GetBool(key));
    } else if (value.kind() == GgufKind::kF32 || value.kind() == GgufKind::kF64) {
      out.emplace_back(key, file.GetDouble(key));
    } else if (value.kind() != GgufKind::kArray) {
      const int64_t number = file.GetInt(key);
      if (number >= 0 && number <= UINT32_MAX) {
        out.emplace_back(key, static_cast<uint32_t>(number));
      } else {
        out.emplace_back(key, number);
      }
    } else if (value.item_kind() == GgufKind::kString) {
      out.emplace_back(key, file.GetStrings(key));
    } else if (value.item_kind() == GgufKind::kF32) {
      const std::vector<double> numbers = file.GetDoubles(key);
      out.emplace_back(key, std::vector<float>(numbers.begin(), numbers.end()));
    } else if (value.item_kind() == GgufKind::kI32) {
      const std::vector<int64_t> numbers = file.GetInts(key);
      out.emplace_back(key, std::vector<int32_t>(numbers.begin(), numbers.end()));
    }  // others (a compiled character map) belong to tokenizers that are not read here
  }
  return out;
}

}  // namespace detour::convert
