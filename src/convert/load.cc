#include "convert/load.h"

#include <filesystem>
#include <fstream>

#include "convert/gguf_import.h"
#include "convert/gguf_vocab.h"
#include "core/error.h"
#include "io/atomic.h"

namespace detour::convert {
namespace {
namespace fs = std::filesystem;

constexpr const char* kMoreTemplates = "additional_chat_templates";

void Copy(const fs::path& from, const fs::path& to) {
  io::WriteFile(to.string(), io::ReadFile(from.string()));
}

}  // namespace

bool IsGguf(const std::string& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return false;
  char magic[4] = {};
  std::ifstream(path, std::ios::binary).read(magic, sizeof(magic));
  return std::string_view(magic, sizeof(magic)) == "GGUF";
}

model::ModelConfig LoadConfig(const std::string& path) {
  return IsGguf(path) ? ConfigFromGguf(io::GgufFile::Open(path)) : model::LoadConfig(path);
}

model::Model LoadModel(const std::string& path, const model::WeightOptions& options) {
  return IsGguf(path) ? ModelFromGguf(io::GgufFile::Open(path), options)
                      : model::LoadModel(path, options);
}

std::unique_ptr<data::Tokenizer> LoadTokenizer(const std::string& path) {
  if (!IsGguf(path)) return data::Tokenizer::Load(path);
  return data::Tokenizer::FromGguf(VocabOf(io::GgufFile::Open(path)), path);
}

data::ChatTemplate LoadChatTemplate(const std::string& path) {
  if (!IsGguf(path)) return data::ChatTemplate::Load(path);
  const io::GgufFile file = io::GgufFile::Open(path);
  std::map<std::string, std::string> tokens;
  const Json config = TokenizerConfigOf(file);
  for (const auto& [key, value] : config.items()) {
    if (key.ends_with("_token") && value.is_string()) tokens[key] = value.get<std::string>();
  }
  const std::string text =
      file.GetStringOr("tokenizer.chat_template", std::string(data::ChatTemplate::DefaultText()));
  return data::ChatTemplate::FromText(text, std::move(tokens), path + ": tokenizer.chat_template");
}

bool WriteTokenizerFiles(const std::string& path, const std::string& dir) {
  if (IsGguf(path)) {
    const io::GgufFile file = io::GgufFile::Open(path);
    const data::BpeSpec spec = data::ReadGgufTokenizer(VocabOf(file), path);
    io::WriteFile(dir + "/tokenizer.json", data::WriteTokenizerJson(spec));
    io::WriteFile(dir + "/tokenizer_config.json", TokenizerConfigOf(file).dump(2) + "\n");
    return true;
  }
  const std::vector<std::string> files = data::TokenizerFiles(path);
  for (const std::string& file : files) Copy(file, fs::path(dir) / fs::path(file).filename());
  if (fs::is_directory(fs::path(path) / kMoreTemplates)) {
    fs::create_directory(fs::path(dir) / kMoreTemplates);
    for (const auto& entry : fs::directory_iterator(fs::path(path) / kMoreTemplates)) {
      if (entry.path().extension() != ".jinja") continue;
      Copy(entry.path(), fs::path(dir) / kMoreTemplates / entry.path().filename());
    }
  }
  return !files.empty();
}

}  // namespace detour::convert
