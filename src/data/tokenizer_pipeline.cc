#include "data/tokenizer_pipeline.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace detour::data {
namespace {

using Steps = std::vector<const Json*>;

class PipelineReader {
 public:
  PipelineReader(const Json& root, const std::string& name, BpeSpec* spec)
      : root_(root), name_(name), spec_(*spec) {}

  void Read() {
    spec_.normalize.clear();
    spec_.pretokenize.clear();
    spec_.decode.clear();
    spec_.prefix_ids.clear();
    spec_.suffix_ids.clear();
    ReadNormalizer();
    ReadPretokenizer();
    ReadDecoder();
    ReadPostprocessor();
  }

 private:
  template <typename... Args>
  [[noreturn]] void Bad(fmt::format_string<Args...> format, Args&&... args) const {
    Fail("data.tokenizer", "{}: {}", name_, fmt::format(format, std::forward<Args>(args)...));
  }
  [[noreturn]] void Unsupported(const char* what, const std::string& got,
                                const char* supported) const {
    Bad("unsupported {} \"{}\"; read here: {}", what, Printable(got), supported);
  }
  std::string In(std::string_view where) const { return fmt::format("{}: {}", name_, where); }

  std::string Type(const Json& component, const char* where) const {
    return GetString(component, "type", In(where));
  }

  /// The component `where`, or those of a Sequence (of Sequences), in order; none for null. `json`
  /// is its text.
  Steps Parts(const char* where, const char* key, std::string* json) const {
    *json = "null";
    if (!HasKey(root_, where, name_)) return {};
    *json = root_[where].dump();
    return Parts(root_[where], where, key);
  }
  Steps Parts(const Json& component, const char* where, const char* key) const {
    if (Type(component, where) != "Sequence") return {&component};
    if (!HasKey(component, key, name_) || !component[key].is_array()) {
      Bad("expected an array \"{}\" in the {} Sequence", key, where);
    }
    Steps parts;
    for (const Json& part : component[key]) {
      const auto inner = Parts(part, where, key);
      parts.insert(parts.end(), inner.begin(), inner.end());
    }
    return parts;
  }

  /// The "pattern" of a Split or Replace.
  std::string Pattern(const Json& component, const char* where, bool* is_regex) const {
    if (!HasKey(component, "pattern", In(where)) || !component["pattern"].is_object()) {
      Bad("{}: expected an object \"pattern\"", where);
    }
    const Json& pattern = component["pattern"];
    *is_regex = HasKey(pattern, "Regex", In(where));
    std::string text = GetString(pattern, *is_regex ? "Regex" : "String", In("pattern"));
    if (text.empty()) Bad("an empty pattern in a {} {}", Type(component, where), where);
    return text;
  }

  /// The character at `key`.
  std::string Character(const Json& component, const char* key, const char* where) const {
    const std::string text = GetString(component, key, In(where));
    if (text.empty() || ReadUtf8Head(text).length != static_cast<int>(text.size())) {
      Bad("{} \"{}\": expected one character, got \"{}\"", where, key, Printable(text));
    }
    return text;
  }

  void ReadNormalizer() {
    using Kind = NormalizeStep::Kind;
    constexpr const char* kWhere = "normalizer";
    for (const Json* part : Parts(kWhere, "normalizers", &spec_.normalizer_json)) {
      const std::string type = Type(*part, kWhere);
      NormalizeStep step;
      if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
        step.form = type == "NFC"    ? NormalForm::kNfc
                    : type == "NFD"  ? NormalForm::kNfd
                    : type == "NFKC" ? NormalForm::kNfkc
                                     : NormalForm::kNfkd;
      } else if (type == "Lowercase") {
        step.kind = Kind::kLowercase;
      } else if (type == "StripAccents") {
        step.kind = Kind::kStripAccents;
      } else if (type == "ByteLevel") {
        step.kind = Kind::kByteLevel;
      } else if (type == "Strip") {
        step.kind = Kind::kStrip;
        step.left = GetBoolOr(*part, "strip_left", In(kWhere), true);
        step.right = GetBoolOr(*part, "strip_right", In(kWhere), true);
      } else if (type == "Prepend") {
        step.kind = Kind::kPrepend;
        step.content = GetString(*part, "prepend", In(kWhere));
      } else if (type == "Replace") {
        step.kind = Kind::kReplace;
        step.pattern = Pattern(*part, kWhere, &step.is_regex);
        step.content = GetString(*part, "content", In(kWhere));
      } else {
        Unsupported(kWhere, type,
                    "NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip, StripAccents, "
                    "ByteLevel, Sequence");
      }
      spec_.normalize.push_back(std::move(step));
    }
  }

  void ReadPretokenizer() {
    for (const Json* part : Parts("pre_tokenizer", "pretokenizers", &spec_.pre_tokenizer_json)) {
      spec_.pretokenize.push_back(PretokenizeStep(*part));
    }
    // Where ByteLevel comes last, the model may as well be given the bytes.
    const auto is_byte_level = [](const PretokenStep& step) { return step.byte_characters; };
    auto& steps = spec_.pretokenize;
    const bool twice = std::any_of(
        spec_.normalize.begin(), spec_.normalize.end(),
        [](const NormalizeStep& step) { return step.kind == NormalizeStep::Kind::kByteLevel; });
    spec_.byte_level = !twice && std::count_if(steps.begin(), steps.end(), is_byte_level) == 1 &&
                       is_byte_level(steps.back()) && !spec_.byte_fallback &&
                       spec_.continuing_subword_prefix.empty() && spec_.end_of_word_suffix.empty();
    if (spec_.byte_level) steps.back().byte_characters = false;
  }

  PretokenStep PretokenizeStep(const Json& part) const {
    constexpr const char* kWhere = "pre_tokenizer";
    const std::string type = Type(part, kWhere);
    PretokenStep step;
    if (type == "ByteLevel") {
      step.byte_characters = true;
      step.add_prefix_space = GetBoolOr(part, "add_prefix_space", In(kWhere), true);
      if (GetBoolOr(part, "use_regex", In(kWhere), true)) step.pattern = kGpt2Pattern;
    } else if (type == "Split") {
      bool is_regex = false;
      step.pattern = Pattern(part, kWhere, &is_regex);
      if (!is_regex) step.separator = Separator::kText;
      step.behavior = Behavior(GetString(part, "behavior", In(kWhere)));
      step.invert = GetBoolOr(part, "invert", In(kWhere), false);
    } else if (type == "Digits") {
      step.separator = Separator::kNumeric;
      step.behavior = GetBoolOr(part, "individual_digits", In(kWhere), false)
                          ? SplitBehavior::kIsolated
                          : SplitBehavior::kContiguous;
    } else if (type == "Punctuation") {
      step.separator = Separator::kPunctuation;
      step.behavior = Behavior(GetStringOr(part, "behavior", In(kWhere), "Isolated"));
    } else if (type == "WhitespaceSplit") {
      step.separator = Separator::kWhiteSpace;
      step.behavior = SplitBehavior::kRemoved;
    } else if (type == "Whitespace") {
      step.pattern = kWordsPattern;
      step.behavior = SplitBehavior::kRemoved;
      step.invert = true;
    } else if (type == "Metaspace") {
      step.metaspace = Character(part, "replacement", "Metaspace");
      step.prepend = Scheme(part);
      step.split = GetBoolOr(part, "split", In(kWhere), true);
    } else {
      Unsupported(kWhere, type,
                  "ByteLevel, Digits, Split, Punctuation, Whitespace, WhitespaceSplit, Metaspace, "
                  "Sequence");
    }
    return step;
  }

  PrependScheme Scheme(const Json& metaspace) const {
    if (!GetBoolOr(metaspace, "add_prefix_space", In("Metaspace"), true)) {
      return PrependScheme::kNever;
    }
    const std::string scheme = GetStringOr(metaspace, "prepend_scheme", In("Metaspace"), "always");
    if (scheme == "always") return PrependScheme::kAlways;
    if (scheme == "first") return PrependScheme::kFirst;
    if (scheme == "never") return PrependScheme::kNever;
    Unsupported("prepend_scheme", scheme, "always, first, never");
  }

  SplitBehavior Behavior(const std::string& name) const {
    if (name == "Isolated") return SplitBehavior::kIsolated;
    if (name == "Removed") return SplitBehavior::kRemoved;
    if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
    if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
    if (name == "Contiguous") return SplitBehavior::kContiguous;
    Unsupported("behavior", name,
                "Isolated, Removed, MergedWithPrevious, MergedWithNext, Contiguous");
  }

  void ReadDecoder() {
    using Kind = DecodeStep::Kind;
    constexpr const char* kWhere = "decoder";
    constexpr const char* kKnown =
        "ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace, BPEDecoder, Sequence";
    if (!HasKey(root_, kWhere, name_)) Unsupported(kWhere, "null", kKnown);
    for (const Json* part : Parts(kWhere, "decoders", &spec_.decoder_json)) {
      const std::string type = Type(*part, kWhere);
      DecodeStep step;
      if (type == "ByteLevel") {
        step.kind = Kind::kByteLevel;
      } else if (type == "ByteFallback") {
        step.kind = Kind::kByteFallback;
      } else if (type == "Fuse") {
        step.kind = Kind::kFuse;
      } else if (type == "Replace") {
        step.kind = Kind::kReplace;
        step.pattern = Pattern(*part, kWhere, &step.is_regex);
        step.content = GetString(*part, "content", In(kWhere));
      } else if (type == "Strip") {
        step.kind = Kind::kStrip;
        step.content = Character(*part, "content", "Strip");
        step.start = GetInt(*part, "start", In(kWhere), 0);
        step.stop = GetInt(*part, "stop", In(kWhere), 0);
      } else if (type == "Metaspace") {
        step.kind = Kind::kMetaspace;
        step.content = Character(*part, "replacement", "Metaspace");
        step.drop_first = Scheme(*part) != PrependScheme::kNever;
      } else if (type == "BPEDecoder") {
        step.kind = Kind::kSuffix;
        step.content = GetStringOr(*part, "suffix", In(kWhere), "</w>");
        if (step.content.empty()) Bad("an empty suffix in a BPEDecoder");
      } else {
        Unsupported(kWhere, type, kKnown);
      }
      spec_.decode.push_back(std::move(step));
    }
  }

  void ReadPostprocessor() {
    constexpr const char* kWhere = "post_processor";
    bool adds = false;
    for (const Json* part : Parts(kWhere, "processors", &spec_.post_processor_json)) {
      const std::string type = Type(*part, kWhere);
      if (type == "ByteLevel") continue;  // only trims offsets
      if (type == "TemplateProcessing") {
        ReadTemplate(*part);
      } else if (type == "RobertaProcessing" || type == "BertProcessing") {
        spec_.prefix_ids = {IdOf(*part, "cls")};
        spec_.suffix_ids = {IdOf(*part, "sep")};
      } else {
        Unsupported(kWhere, type,
                    "ByteLevel, TemplateProcessing, RobertaProcessing, BertProcessing, Sequence");
      }
      if (std::exchange(adds, true)) Bad("two post-processors that add tokens");
    }
  }

  void ReadTemplate(const Json& processor) {
    const std::string where = In("TemplateProcessing");
    if (!HasKey(processor, "single", where) || !processor["single"].is_array()) {
      Bad("expected an array \"single\" in TemplateProcessing");
    }
    bool seen_text = false;
    for (const Json& item : processor["single"]) {
      if (HasKey(item, "Sequence", where)) {
        if (std::exchange(seen_text, true)) Bad("TemplateProcessing \"single\" has the text twice");
        continue;
      }
      const std::string token = GetString(Object(item, "SpecialToken"), "id", where);
      const Json& tokens = Object(processor, "special_tokens");
      if (!tokens.contains(token)) {
        Bad("TemplateProcessing does not define \"{}\"", Printable(token));
      }
      const std::vector<int64_t> ids = GetInts(tokens[token], "ids", where, 0, NumIds() - 1);
      auto& target = seen_text ? spec_.suffix_ids : spec_.prefix_ids;
      target.insert(target.end(), ids.begin(), ids.end());
    }
    if (!seen_text) Bad("TemplateProcessing \"single\" lacks the text");
  }

  /// Of "cls" or "sep": ["<s>", 0].
  int32_t IdOf(const Json& processor, const char* key) const {
    if (HasKey(processor, key, name_)) {
      const Json& pair = processor[key];
      if (pair.is_array() && pair.size() == 2 && pair[0].is_string() &&
          pair[1].is_number_unsigned() &&
          pair[1].get<uint64_t>() < static_cast<uint64_t>(NumIds())) {
        return pair[1].get<int32_t>();
      }
    }
    Bad("post_processor: expected \"{}\": [token, id below {}]", key, NumIds());
  }

  const Json& Object(const Json& parent, const char* key) const {
    if (!HasKey(parent, key, name_) || !parent[key].is_object()) {
      Bad("expected an object \"{}\"", key);
    }
    return parent[key];
  }

  int64_t NumIds() const {
    int64_t size = spec_.vocab.size();
    for (const AddedToken& token : spec_.added_tokens) size = std::max<int64_t>(size, token.id + 1);
    return size;
  }

  const Json& root_;
  const std::string& name_;
  BpeSpec& spec_;
};

}  // namespace

void ReadPipeline(const Json& root, const std::string& name, BpeSpec* spec) {
  PipelineReader(root, name, spec).Read();
}

}  // namespace detour::data
