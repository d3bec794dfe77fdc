#include "io/sharded.h"

#include <filesystem>
#include <system_error>

#include "core/error.h"
#include "core/json.h"
#include "io/atomic.h"

namespace detour::io {
namespace {

constexpr int64_t kMaxIndexBytes = int64_t{100} << 20;

// tensor -> shard file name. A shard may be a symbolic link (the Hugging Face cache is made of
// them), its name no path.
std::map<std::string, std::string> ReadWeightMap(const std::string& index_path) {
  const Json index = ParseJson(ReadFile(index_path, kMaxIndexBytes), index_path, 8);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    Fail("io.safetensors", "{}: expected an object with an object \"weight_map\"", index_path);
  }
  std::map<std::string, std::string> weight_map;
  for (const auto& [name, value] : index["weight_map"].items()) {
    const std::string shard = value.is_string() ? value.get<std::string>() : "";
    if (shard.empty() || shard == "." || shard == ".." ||
        shard.find_first_of(std::string_view("/\0", 2)) != shard.npos) {
      Fail("io.safetensors",
           "{}: \"{}\": expected the name of a file in the same directory, got {}", index_path,
           Printable(name), value.is_string() ? Printable(shard) : value.type_name());
    }
    weight_map[name] = shard;
  }
  return weight_map;
}

}  // namespace

ShardedTensors ShardedTensors::Open(const std::string& directory) {
  namespace fs = std::filesystem;
  ShardedTensors out;
  out.directory_ = directory;
  const std::string single = directory + "/model.safetensors";
  const std::string index_path = single + ".index.json";
  std::error_code error;
  if (fs::exists(single, error) || error) {
    out.files_.push_back(SafetensorsFile::Open(single));
    for (const auto& [name, info] : out.files_[0].tensors()) out.file_of_[name] = 0;
    return out;
  }
  if (!fs::exists(index_path, error)) {
    Fail("io.safetensors", "{}: expected model.safetensors or model.safetensors.index.json in it",
         directory);
  }
  const std::map<std::string, std::string> weight_map = ReadWeightMap(index_path);
  std::map<std::string, size_t> shards;
  for (const auto& [name, shard] : weight_map) {
    const auto [it, is_new] = shards.try_emplace(shard, out.files_.size());
    if (is_new) out.files_.push_back(SafetensorsFile::Open(directory + "/" + shard));
    if (!out.files_[it->second].Has(name)) {
      Fail("io.safetensors", "{}: \"{}\" is not in {}, where the index says it is", index_path,
           Printable(name), Printable(shard));
    }
    out.file_of_[name] = it->second;
  }
  for (const auto& [shard, i] : shards) {
    for (const auto& [name, info] : out.files_[i].tensors()) {
      const auto it = weight_map.find(name);
      if (it == weight_map.end() || it->second != shard) {
        Fail(
            "io.safetensors", "{}: \"{}\" is in {}, but the index {}", index_path, Printable(name),
            Printable(shard),
            it == weight_map.end() ? "does not list it" : "says it is in " + Printable(it->second));
      }
    }
  }
  return out;
}

std::vector<std::string> ShardedTensors::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, i] : file_of_) names.push_back(name);
  return names;
}

const SafetensorsFile& ShardedTensors::FileOf(const std::string& name) const {
  const auto it = file_of_.find(name);
  if (it == file_of_.end()) {
    Fail("io.safetensors", "{}: tensor \"{}\" is missing", directory_, Printable(name));
  }
  return files_[it->second];
}

}  // namespace detour::io
