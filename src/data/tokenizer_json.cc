// tokenizer.json with a BPE model: reader and writer.
#include <algorithm>
#include <numeric>
#include <unordered_map>

#include "core/error.h"
#include "core/json.h"
#include "data/bpe_tokenizer.h"
#include "data/tokenizer_pipeline.h"

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
    ReadAddedTokens();
    ReadPipeline(root_, name_, &spec_);
    return std::move(spec_);
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

  const Json& Object(const Json& parent, const char* key) const {
    if (!HasKey(parent, key, name_) || !parent[key].is_object())
      Bad("expected an object \"{}\"", key);
    return parent[key];
  }
  void ReadModel(const Json& model) {
    const std::string where = In("model");
    const std::string type = GetStringOr(model, "type", where, "BPE");
    if (type != "BPE") Unsupported("model", type, "BPE");
    if (GetDoubleOr(model, "dropout", where, 0) != 0) {
      Unsupported("model option", "dropout", "0: ids must not depend on chance");
    }
    spec_.continuing_subword_prefix = GetStringOr(model, "continuing_subword_prefix", where, "");
    spec_.end_of_word_suffix = GetStringOr(model, "end_of_word_suffix", where, "");
    spec_.byte_fallback = GetBoolOr(model, "byte_fallback", where, false);
    spec_.ignore_merges = GetBoolOr(model, "ignore_merges", where, false);
    spec_.fuse_unk = GetBoolOr(model, "fuse_unk", where, false);
    ReadVocab(Object(model, "vocab"));
    // Some files write "" for none.
    if (const std::string unk = GetStringOr(model, "unk_token", where, ""); !unk.empty()) {
      spec_.unk_id = IdOf(unk, "unk_token");
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
      const auto merged = MergedToken(spec_, left, right);
      if (!merged) {
        Bad("merge \"{}\" \"{}\": the second has not the continuing_subword_prefix",
            Printable(left), Printable(right));
      }
      IdOf(*merged, "a merge");
      spec_.merges.emplace_back(left_id, right_id);
    }
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

const char kGpt2ByteLevelJson[] =
    R"({"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true})";

std::optional<std::string> MergedToken(const BpeSpec& spec, const std::string& left,
                                       const std::string& right) {
  if (right.size() < spec.continuing_subword_prefix.size()) return std::nullopt;
  return left + right.substr(spec.continuing_subword_prefix.size());
}

std::string WriteTokenizerJson(const BpeSpec& spec) {
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
  const auto text = [](const std::string& value) { return value.empty() ? "null" : Quoted(value); };
  // The vocabulary is written by hand: Json looks up every key that it adds.
  std::string out = "{\n\"version\": \"1.0\",\n\"truncation\": null,\n\"padding\": null,\n";
  out += "\"added_tokens\": " + added.dump() + ",\n\"normalizer\": " + spec.normalizer_json + ",\n";
  out += "\"pre_tokenizer\": " + spec.pre_tokenizer_json + ",\n\"post_processor\": ";
  out += spec.post_processor_json + ",\n\"decoder\": " + spec.decoder_json + ",\n\"model\": {\n";
  out += fmt::format("\"type\": \"BPE\", \"dropout\": null, \"unk_token\": {},\n",
                     text(spec.unk_id ? spec.vocab[*spec.unk_id] : ""));
  out += fmt::format("\"continuing_subword_prefix\": {}, \"end_of_word_suffix\": {},\n",
                     text(spec.continuing_subword_prefix), text(spec.end_of_word_suffix));
  out +=
      fmt::format("\"fuse_unk\": {}, \"byte_fallback\": {}, \"ignore_merges\": {},\n\"vocab\": {{",
                  spec.fuse_unk, spec.byte_fallback, spec.ignore_merges);
  const char* separator = "\n";
  for (size_t id = 0; id < spec.vocab.size(); ++id) {
    if (spec.vocab[id].empty()) continue;
    out += fmt::format("{}{}: {}", separator, Quoted(spec.vocab[id]), id);
    separator = ",\n";
  }
  std::vector<size_t> order(spec.merges.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (!spec.merge_ranks.empty()) {
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return spec.merge_ranks[a] < spec.merge_ranks[b]; });
  }
  out += "\n},\n\"merges\": [";
  separator = "\n";
  for (const size_t i : order) {
    const auto [left, right] = spec.merges[i];
    out +=
        fmt::format("{}[{}, {}]", separator, Quoted(spec.vocab[left]), Quoted(spec.vocab[right]));
    separator = ",\n";
  }
  return out + "\n]\n}\n}\n";
}

}  // namespace detour::data
