// tokenizer.json of the byte-level BPE family: reader and writer.
#include <algorithm>
#include <unordered_map>

#include "core/error.h"
#include "core/json.h"
#include "data/bpe_tokenizer.h"
#include "data/utf8.h"

namespace detour::data {
namespace {

// Ids without a token are allowed (models leave holes), but a small file may not ask for a huge
// table.
constexpr int64_t kMaxHoles = 1 << 20;
constexpr int64_t kMaxVocab = 1 << 23;

class Reader {
 public:
  Reader(const Json& root, const std::string& name) : root_(root), name_(name) {}

  BpeSpec Read() {
    if (!root_.is_object()) Bad("expected an object");
    const Json& model = Object(root_, "model");
    ReadModel(model);
    if (HasKey(root_, "normalizer", name_)) {
      const Json& normalizer = root_["normalizer"];
      const auto parts = Parts(normalizer, "normalizer", "normalizers");
      if (!parts.empty()) Unsupported("normalizer", Type(*parts[0], "normalizer"), "none");
    }
    ReadPretokenizer();
    ReadDecoder();
    ReadAddedTokens();
    ReadPostprocessor();
    return std::move(spec_);
  }

 private:
  template <typename... Args>
  [[noreturn]] void Bad(fmt::format_string<Args...> format, Args&&... args) const {
    Fail("data.tokenizer", "{}: {}", name_, fmt::format(format, std::forward<Args>(args)...));
  }
  [[noreturn]] void Unsupported(const char* what, const std::string& got,
                                const char* supported) const {
    Bad("unsupported {} \"{}\"; read here: {} (byte-level BPE)", what, Printable(got), supported);
  }
  std::string In(std::string_view where) const { return fmt::format("{}: {}", name_, where); }

  const Json& Object(const Json& parent, const char* key) const {
    if (!HasKey(parent, key, name_) || !parent[key].is_object())
      Bad("expected an object \"{}\"", key);
    return parent[key];
  }
  std::string Type(const Json& component, const char* where) const {
    return GetString(component, "type", In(where));
  }

  /// A component, or those of a Sequence (of Sequences), in order.
  std::vector<const Json*> Parts(const Json& component, const char* where, const char* key) const {
    if (Type(component, where) != "Sequence") return {&component};
    if (!HasKey(component, key, name_) || !component[key].is_array()) {
      Bad("expected an array \"{}\" in the {} Sequence", key, where);
    }
    std::vector<const Json*> parts;
    for (const Json& part : component[key]) {
      const auto inner = Parts(part, where, key);
      parts.insert(parts.end(), inner.begin(), inner.end());
    }
    return parts;
  }

  void ReadModel(const Json& model) {
    const std::string where = In("model");
    const std::string type = GetStringOr(model, "type", where, "BPE");
    if (type != "BPE") Unsupported("model", type, "BPE");
    if (GetDoubleOr(model, "dropout", where, 0) != 0)
      Unsupported("model option", "dropout", "none");
    for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!GetStringOr(model, affix, where, "").empty()) {
        Unsupported("model option", affix, "an empty one");
      }
    }
    if (GetBoolOr(model, "byte_fallback", where, false)) {
      Unsupported("model option", "byte_fallback", "byte_fallback false");
    }
    spec_.ignore_merges = GetBoolOr(model, "ignore_merges", where, false);
    spec_.fuse_unk = GetBoolOr(model, "fuse_unk", where, false);
    ReadVocab(Object(model, "vocab"));
    if (HasKey(model, "unk_token", where)) {
      spec_.unk_id = IdOf(GetString(model, "unk_token", where), "unk_token");
    }
    if (!HasKey(model, "merges", where) || !model["merges"].is_array()) {
      Bad("expected an array \"merges\"");
    }
    ReadMerges(model["merges"]);
  }

  void ReadVocab(const Json& vocab) {
    const int64_t limit = std::min<int64_t>(kMaxVocab, vocab.size() + kMaxHoles);
    int64_t size = 0;
    for (const auto& [token, id] : vocab.items()) {
      if (token.empty()) Bad("an empty token in the vocabulary");
      if (!id.is_number_integer() || id.get<double>() < 0 || id.get<double>() >= limit) {
        Bad("token \"{}\": expected an id in [0, {}), got {}", Printable(token), limit,
            Printable(id.dump(-1, ' ', true)));
      }
      size = std::max(size, id.get<int64_t>() + 1);
      ids_.emplace(token, id.get<int32_t>());
    }
    if (size == 0) Bad("an empty vocabulary");
    spec_.vocab.resize(size);
    for (const auto& [token, id] : ids_) {
      std::string& place = spec_.vocab[id];
      if (!place.empty()) {
        Bad("id {} is given to two tokens, \"{}\" and \"{}\"", id,
            Printable(std::min(place, token)), Printable(std::max(place, token)));
      }
      place = token;
    }
  }

  int32_t IdOf(const std::string& token, const char* what) const {
    const auto it = ids_.find(token);
    if (it == ids_.end())
      Bad("{} names \"{}\", which is not in the vocabulary", what, Printable(token));
    return it->second;
  }

  void ReadMerges(const Json& merges) {
    spec_.merges.reserve(merges.size());
    for (const Json& merge : merges) {
      std::string left, right;
      if (merge.is_string()) {
        const std::string& line = merge.get_ref<const std::string&>();
        if (line.starts_with("#version")) continue;
        const size_t space = line.find(' ');
        if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos) {
          Bad("merge \"{}\": expected two tokens and one space", Printable(line));
        }
        left = line.substr(0, space);
        right = line.substr(space + 1);
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
                 merge[1].is_string()) {
        left = merge[0].get<std::string>();
        right = merge[1].get<std::string>();
      } else {
        Bad("a merge is neither \"a b\" nor [\"a\", \"b\"]: {}",
            Printable(merge.dump(-1, ' ', true)));
      }
      const int32_t left_id = IdOf(left, "a merge"), right_id = IdOf(right, "a merge");
      IdOf(left + right, "a merge");
      spec_.merges.emplace_back(left_id, right_id);
    }
  }

  void ReadPretokenizer() {
    constexpr const char* kKnown = "ByteLevel, Split, Digits, Sequence";
    if (!HasKey(root_, "pre_tokenizer", name_)) Unsupported("pre_tokenizer", "null", kKnown);
    bool byte_level = false;
    for (const Json* part : Parts(root_["pre_tokenizer"], "pre_tokenizer", "pretokenizers")) {
      const std::string where = In("pre_tokenizer"), type = Type(*part, "pre_tokenizer");
      if (byte_level)
        Bad("a pre_tokenizer \"{}\" after ByteLevel: ByteLevel must be last", Printable(type));
      PretokenStep step;
      if (type == "ByteLevel") {
        byte_level = true;
        step.add_prefix_space = GetBoolOr(*part, "add_prefix_space", where, true);
        if (GetBoolOr(*part, "use_regex", where, true)) step.pattern = kGpt2Pattern;
      } else if (type == "Split") {
        step.pattern = Pattern(*part);
        step.behavior = Behavior(GetString(*part, "behavior", where));
        step.invert = GetBoolOr(*part, "invert", where, false);
      } else if (type == "Digits") {
        step.pattern = GetBoolOr(*part, "individual_digits", where, false) ? "\\p{N}" : "\\p{N}+";
      } else {
        Unsupported("pre_tokenizer", type, kKnown);
      }
      spec_.pretokenize.push_back(std::move(step));
    }
    if (!byte_level) Unsupported("pre_tokenizer", "without ByteLevel", kKnown);
  }

  std::string Pattern(const Json& split) const {
    const Json& pattern = Object(split, "pattern");
    std::string text;
    if (HasKey(pattern, "Regex", name_)) {
      text = GetString(pattern, "Regex", In("pattern"));
    } else {
      for (const char c : GetString(pattern, "String", In("pattern"))) {
        const bool ascii = static_cast<uint8_t>(c) < 0x80;
        if (ascii && !std::isalnum(static_cast<unsigned char>(c))) text += '\\';
        text += c;
      }
    }
    if (text.empty()) Bad("an empty pattern in a Split pre_tokenizer");
    return text;
  }

  SplitBehavior Behavior(const std::string& name) const {
    if (name == "Isolated") return SplitBehavior::kIsolated;
    if (name == "Removed") return SplitBehavior::kRemoved;
    if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
    if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
    if (name == "Contiguous") return SplitBehavior::kContiguous;
    Unsupported("Split behavior", name,
                "Isolated, Removed, MergedWithPrevious, MergedWithNext, Contiguous");
  }

  void ReadDecoder() const {
    if (!HasKey(root_, "decoder", name_)) Unsupported("decoder", "null", "ByteLevel");
    const auto parts = Parts(root_["decoder"], "decoder", "decoders");
    for (const Json* part : parts) {
      if (Type(*part, "decoder") != "ByteLevel" || parts.size() > 1) {
        Unsupported("decoder", Type(*part, "decoder"), "ByteLevel");
      }
    }
    if (parts.empty()) Unsupported("decoder", "empty Sequence", "ByteLevel");
  }

  void ReadAddedTokens() {
    if (!HasKey(root_, "added_tokens", name_)) return;
    const Json& tokens = root_["added_tokens"];
    if (!tokens.is_array()) Bad("expected an array \"added_tokens\"");
    const std::string where = In("added_tokens");
    const int64_t limit = spec_.vocab.size() + tokens.size() + kMaxHoles;
    for (const Json& json : tokens) {
      AddedToken token;
      token.id = static_cast<int32_t>(GetInt(json, "id", where, 0, limit - 1));
      token.content = GetString(json, "content", where);
      token.single_word = GetBoolOr(json, "single_word", where, false);
      token.lstrip = GetBoolOr(json, "lstrip", where, false);
      token.rstrip = GetBoolOr(json, "rstrip", where, false);
      token.special = GetBoolOr(json, "special", where, false);
      token.normalized = GetBoolOr(json, "normalized", where, !token.special);
      if (token.content.empty()) continue;  // as `tokenizers` does
      const std::string shown = Printable(token.content);
      const auto known = ids_.find(token.content);
      if (known != ids_.end() && known->second != token.id) {
        Bad("added token \"{}\": id {} here, {} elsewhere", shown, token.id, known->second);
      }
      if (!added_ids_.insert({token.id, token.content}).second) {
        Bad("added token \"{}\": id {} is given twice", shown, token.id);
      }
      const bool in_vocab =
          token.id < static_cast<int64_t>(spec_.vocab.size()) && !spec_.vocab[token.id].empty();
      if (in_vocab && known == ids_.end()) {
        Bad("added token \"{}\": id {} is token \"{}\" of the vocabulary", shown, token.id,
            Printable(spec_.vocab[token.id]));
      }
      ids_.emplace(token.content, token.id);
      spec_.added_tokens.push_back(std::move(token));
    }
  }

  void ReadPostprocessor() {
    if (!HasKey(root_, "post_processor", name_)) return;
    constexpr const char* kKnown = "ByteLevel, TemplateProcessing, Sequence";
    bool has_template = false;
    for (const Json* part : Parts(root_["post_processor"], "post_processor", "processors")) {
      const std::string type = Type(*part, "post_processor");
      if (type == "ByteLevel") continue;  // only trims offsets
      if (type != "TemplateProcessing") Unsupported("post_processor", type, kKnown);
      if (std::exchange(has_template, true)) Bad("two TemplateProcessing post-processors");
      ReadTemplate(*part);
    }
  }

  void ReadTemplate(const Json& processor) {
    if (!HasKey(processor, "single", name_) || !processor["single"].is_array()) {
      Bad("expected an array \"single\" in TemplateProcessing");
    }
    bool seen_text = false;
    for (const Json& item : processor["single"]) {
      if (HasKey(item, "Sequence", name_)) {
        if (std::exchange(seen_text, true)) Bad("TemplateProcessing \"single\" has the text twice");
        continue;
      }
      const std::string token =
          GetString(Object(item, "SpecialToken"), "id", In("TemplateProcessing"));
      const Json& tokens = Object(processor, "special_tokens");
      if (!tokens.contains(token))
        Bad("TemplateProcessing does not define \"{}\"", Printable(token));
      const std::vector<int64_t> ids =
          GetInts(tokens[token], "ids", In("TemplateProcessing"), 0, NumIds() - 1);
      auto& target = seen_text ? spec_.suffix_ids : spec_.prefix_ids;
      target.insert(target.end(), ids.begin(), ids.end());
    }
    if (!seen_text) Bad("TemplateProcessing \"single\" lacks the text");
  }

  int64_t NumIds() const {
    int64_t size = spec_.vocab.size();
    for (const AddedToken& token : spec_.added_tokens) size = std::max<int64_t>(size, token.id + 1);
    return size;
  }

  const Json& root_;
  const std::string& name_;
  BpeSpec spec_;
  std::unordered_map<std::string, int32_t> ids_;
  std::unordered_map<int32_t, std::string> added_ids_;
};

std::string Quoted(const std::string& text) { return Json(text).dump(); }

}  // namespace

BpeSpec ParseTokenizerJson(std::string_view json, const std::string& name) {
  const Json root = ParseJson(json, name);
  return Reader(root, name).Read();
}

std::unique_ptr<Tokenizer> LoadTokenizerJson(std::string_view json, const std::string& name) {
  return std::make_unique<BpeTokenizer>(ParseTokenizerJson(json, name));
}

std::vector<PretokenStep> Gpt2Pretokenize() { return {{.pattern = kGpt2Pattern}}; }

std::string WriteTokenizerJson(const BpeSpec& spec) {
  DETOUR_CHECK(spec.pretokenize.size() == 1 && spec.pretokenize[0].pattern == kGpt2Pattern &&
               !spec.pretokenize[0].add_prefix_space);
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  Json added = Json::array();
  for (const AddedToken& token : spec.added_tokens) {
    added.push_back({{"id", token.id},
                     {"content", token.content},
                     {"single_word", token.single_word},
                     {"lstrip", token.lstrip},
                     {"rstrip", token.rstrip},
                     {"normalized", token.normalized},
                     {"special", token.special}});
  }
  // The vocabulary is written by hand: Json looks up every key that it adds.
  std::string out = "{\n\"version\": \"1.0\",\n\"truncation\": null,\n\"padding\": null,\n";
  out += "\"added_tokens\": " + added.dump() + ",\n\"normalizer\": null,\n";
  out += "\"pre_tokenizer\": " + byte_level.dump() + ",\n\"post_processor\": null,\n";
  out += "\"decoder\": " + byte_level.dump() + ",\n\"model\": {\n";
  out += "\"type\": \"BPE\", \"dropout\": null, \"unk_token\": null,\n";
  out += "\"continuing_subword_prefix\": null, \"end_of_word_suffix\": null,\n";
  out += "\"fuse_unk\": false, \"byte_fallback\": false, \"ignore_merges\": false,\n\"vocab\": {";
  const char* separator = "\n";
  for (size_t id = 0; id < spec.vocab.size(); ++id) {
    if (spec.vocab[id].empty()) continue;
    out += fmt::format("{}{}: {}", separator, Quoted(spec.vocab[id]), id);
    separator = ",\n";
  }
  out += "\n},\n\"merges\": [";
  separator = "\n";
  for (const auto& [left, right] : spec.merges) {
    out +=
        fmt::format("{}[{}, {}]", separator, Quoted(spec.vocab[left]), Quoted(spec.vocab[right]));
    separator = ",\n";
  }
  return out + "\n]\n}\n}\n";
}

}  // namespace detour::data
