#include "train/checkpoint.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "core/error.h"
#include "io/atomic.h"
#include "io/safetensors.h"

namespace detour::train {

namespace fs = std::filesystem;

namespace {

constexpr const char* kPrefix = "step-";
constexpr const char* kLoraFile = "/lora.safetensors";

std::vector<fs::path> Checkpoints(const std::string& out_dir) {
  std::vector<fs::path> found;
  for (const fs::directory_entry& entry : fs::directory_iterator(out_dir)) {
    if (entry.is_directory() && entry.path().filename().string().starts_with(kPrefix)) {
      found.push_back(entry.path());
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

void WriteOptimizer(AdamW& optimizer, const std::string& path) {
  std::vector<io::TensorToWrite> tensors;
  optimizer.ForEachState([&](const std::string& name, at::Tensor& t) {
    tensors.push_back({name, io::DType::kF32, t.sizes().vec(),
                       std::as_bytes(std::span(ops::F32(t), static_cast<size_t>(t.numel())))});
  });
  io::WriteSafetensors(path, tensors);
}

std::vector<double> Numbers(const Json& json, const char* key) {
  std::vector<double> numbers;
  if (!json.contains(key) || !json.at(key).is_array()) return numbers;
  for (const Json& value : json.at(key)) {
    if (value.is_number()) numbers.push_back(value.get<double>());
  }
  return numbers;
}

}  // namespace

std::string SaveCheckpoint(const std::string& out_dir, model::Model& model, AdamW& optimizer,
                           Lora* lora, const TrainerState& state,
                           const std::vector<std::string>& tokenizer_files, int64_t keep_last) {
  const std::string name = fmt::format("{}{:08}", kPrefix, state.step);
  io::AtomicDir dir(out_dir + "/" + name);
  model::SaveModel(model, dir.path());
  for (const std::string& file : tokenizer_files) {
    io::WriteFile(dir.path() + "/" + fs::path(file).filename().string(), io::ReadFile(file));
  }
  WriteOptimizer(optimizer, dir.path() + "/optimizer.safetensors");
  if (lora) lora->Save(dir.path() + kLoraFile);
  const Json json = {{"format", 1},
                     {"step", state.step},
                     {"tokens", state.tokens},
                     {"next_sequence", state.next_sequence},
                     {"seed", state.seed},
                     {"seconds", state.seconds},
                     {"duals", state.duals},
                     {"drifts", state.drifts},
                     {"config", state.config}};
  io::WriteFile(dir.path() + "/trainer_state.json", json.dump(2) + "\n");
  dir.Commit();
  io::ReplaceSymlink(out_dir + "/latest", name);
  std::vector<fs::path> all = Checkpoints(out_dir);
  for (size_t i = 0; i + static_cast<size_t>(std::max<int64_t>(keep_last, 1)) < all.size(); ++i) {
    if (all[i].filename() != name) io::RemoveDir(all[i].string());
  }
  return out_dir + "/" + name;
}

std::string LatestCheckpoint(const std::string& out_dir) {
  if (!fs::is_directory(out_dir)) return "";
  io::CleanTemporaries(out_dir);
  const std::string latest = out_dir + "/latest";
  if (!fs::is_symlink(latest)) {
    if (!fs::exists(latest)) return "";
    Fail("train.checkpoint", "{}: expected a link to a checkpoint, got something else", latest);
  }
  return out_dir + "/" + fs::read_symlink(latest).string();
}

void LoadTrained(const std::string& dir, AdamW& optimizer, Lora* lora) {
  const io::SafetensorsFile file = io::SafetensorsFile::Open(dir + "/optimizer.safetensors");
  optimizer.ForEachState([&](const std::string& name, at::Tensor& t) {
    const io::TensorInfo& info = file.Get(name);
    if (t.sizes() != at::IntArrayRef(info.shape)) {
      Fail("train.checkpoint", "{}: {}: the shape is not the weight's", dir, name);
    }
    file.ReadF32Into(name, {ops::F32(t), static_cast<size_t>(t.numel())});
  });
  if (lora) lora->Load(dir + kLoraFile);
}

TrainerState LoadTrainerState(const std::string& dir) {
  const std::string path = dir + "/trainer_state.json";
  const Json json = ParseJson(io::ReadFile(path, 1 << 24), path);
  TrainerState state;
  GetInt(json, "format", path, 1, 1);
  state.step = GetInt(json, "step", path, 0);
  state.tokens = GetInt(json, "tokens", path, 0);
  state.next_sequence = GetInt(json, "next_sequence", path, 0);
  state.seed = static_cast<uint64_t>(GetInt(json, "seed", path, 0));
  state.seconds = GetDouble(json, "seconds", path, 0);
  state.duals = Numbers(json, "duals");
  state.drifts = Numbers(json, "drifts");
  if (!json.contains("config") || !json.at("config").is_object()) {
    Fail("train.checkpoint", "{}: config: expected an object", path);
  }
  state.config = json.at("config");
  return state;
}

}  // namespace detour::train
