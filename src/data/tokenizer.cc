#include "data/tokenizer.h"

#include <filesystem>

#include "core/error.h"
#include "core/json.h"
#include "core/sha256.h"
#include "data/shards.h"
#include "io/atomic.h"

namespace detour::data {
namespace fs = std::filesystem;

namespace {
constexpr int64_t kMaxFileBytes = int64_t{1} << 28;
constexpr int64_t kMaxConfigBytes = int64_t{1} << 24;
}  // namespace

void Tokenizer::CheckId(int32_t id) const {
  if (id < 0 || id >= vocab_size_) {
    Fail("data.tokenizer", "token id {}: expected one in [0, {})", id, vocab_size_);
  }
}

std::string Tokenizer::DecodeIds(std::span<const int32_t> ids, bool skip_special) const {
  std::string text;
  for (const int32_t id : ids) {
    if (!skip_special || !IsSpecial(id)) text += DecodeToken(id);
  }
  return text;
}

std::vector<std::string> TokenizerFiles(const std::string& path) {
  if (!fs::is_directory(path)) return {path};
  std::vector<std::string> files;
  for (const char* name : {"tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                           "special_tokens_map.json", "chat_template.jinja"}) {
    if (fs::exists(path + "/" + name)) files.push_back(path + "/" + name);
  }
  return files;
}

bool HasTokenizer(const std::string& path) {
  return fs::exists(path + "/tokenizer.json") || fs::exists(path + "/tokenizer.model");
}

void CheckMadeWith(const TokenShards& shards, const Tokenizer& tokenizer,
                   const std::string& model) {
  if (shards.vocab_size() == tokenizer.vocab_size()) return;
  Fail("data.tokenizer",
       "{}: its tokenizer has {} tokens, the data were made with one of {}. Hint: detour prepare "
       "TEXT --tokenizer {} --out-dir DIR",
       model, tokenizer.vocab_size(), shards.vocab_size(), model);
}

std::unique_ptr<Tokenizer> Tokenizer::Load(const std::string& path) {
  std::string file = path;
  if (fs::is_directory(path)) {
    if (!HasTokenizer(path)) {
      Fail("data.tokenizer", "{}: expected tokenizer.json or tokenizer.model, got neither", path);
    }
    file = path + "/tokenizer.json";
    if (!fs::exists(file)) file = path + "/tokenizer.model";
  }
  const std::string content = io::ReadFile(file, kMaxFileBytes);
  std::unique_ptr<Tokenizer> tokenizer = fs::path(file).extension() == ".json"
                                             ? LoadTokenizerJson(content, file)
                                             : LoadSentencePiece(content, file);
  tokenizer->fingerprint_ = Sha256Hex(content);
  const fs::path config = fs::path(file).parent_path() / "tokenizer_config.json";
  if (fs::exists(config)) tokenizer->ReadConfig(config.string());
  return tokenizer;
}

void Tokenizer::ReadConfig(const std::string& path) {
  const Json config = ParseJson(io::ReadFile(path, kMaxConfigBytes), path);
  // A token is a string or, in older files, an object that has it as "content".
  const auto read = [&](const char* key, std::optional<int32_t>* id) {
    if (!HasKey(config, key, path)) return;
    const std::string token = config[key].is_object()
                                  ? GetString(config[key], "content", path + ": " + key)
                                  : GetString(config, key, path);
    const std::optional<int32_t> found = TokenId(token);
    if (!found) {
      Fail("data.tokenizer", "{}: {} \"{}\" is not a token of this tokenizer", path, key,
           Printable(token));
    }
    *id = found;
  };
  read("bos_token", &bos_id_);
  read("eos_token", &eos_id_);
  // Training code adds a padding token that no vocabulary has; nothing here needs one.
  if (HasKey(config, "pad_token", path) && config["pad_token"].is_string()) {
    pad_id_ = TokenId(GetString(config, "pad_token", path));
  }
  if (HasKey(config, "add_bos_token", path)) add_bos_ = GetBool(config, "add_bos_token", path);
  if (HasKey(config, "add_eos_token", path)) add_eos_ = GetBool(config, "add_eos_token", path);
}

}  // namespace detour::data
