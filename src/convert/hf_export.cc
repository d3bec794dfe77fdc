#include "convert/hf_export.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "convert/load.h"
#include "convert/python_files.h"
#include "core/error.h"
#include "io/atomic.h"

namespace detour::convert {
namespace {
namespace fs = std::filesystem;

constexpr const char* kEnds[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
constexpr float kMaxF16 = 65504;

/// Whether transformers has a class of its own for it.
bool IsOfFamily(const model::ModelConfig& c) {
  const bool routed =
      std::any_of(c.routing.begin(), c.routing.end(), [](const auto& r) { return !r.of_family; });
  return !routed && (c.model_type != "llama" || c.hidden_size % c.num_heads == 0);
}

/// What modeling_detour.py does not compute, or "".
std::string NotInPython(const model::ModelConfig& c) {
  if (c.qkv_bias || c.o_bias || c.mlp_bias) return "biases";
  if (c.qk_norm) return "norms of queries and keys";
  if (!c.slides.empty()) return "sliding windows";
  if (!c.without_rotation.empty()) return "layers without rotation";
  if (c.rope_scaling.type != "default") return c.rope_scaling.type + " rotary positions";
  return "";
}

/// The same model as a plain Llama with routers, whatever its family called them.
model::ModelConfig AsDetour(const model::ModelConfig& config, const std::string& source) {
  if (const std::string what = NotInPython(config); !what.empty()) {
    Fail("convert.hf", "{}: a routed model with {} has no class in transformers", source, what);
  }
  model::ModelConfig c = config;
  c.model_type = "llama";
  for (routing::RoutingConfig& r : c.routing) r.of_family = false;
  c.extra = Json::object();
  for (const char* key : kEnds) {
    if (config.extra.contains(key)) c.extra[key] = config.extra.at(key);
  }
  return c;
}

/// The ids that end texts, where config.json does not name them: transformers' own defaults would
/// be tokens of another vocabulary.
void AddEnds(const data::Tokenizer* tokenizer, Json* config) {
  const std::optional<int32_t> ids[] = {tokenizer ? tokenizer->bos_id() : std::nullopt,
                                        tokenizer ? tokenizer->eos_id() : std::nullopt,
                                        tokenizer ? tokenizer->pad_id() : std::nullopt};
  for (size_t i = 0; i < std::size(kEnds); ++i) {
    Json& id = (*config)[kEnds[i]];  // null: not set
    if (id.is_null() && ids[i]) id = *ids[i];
  }
}

void WriteWeights(model::Model& model, const model::ModelConfig& config, const std::string& dir,
                  io::DType dtype) {
  std::vector<io::TensorToWrite> tensors;
  std::vector<std::vector<std::byte>> halves;
  ForEachTensor(model, [&](const std::string& our_name, at::Tensor& t) {
    const std::string name = FileName(config, our_name);
    const std::span<const float> values(t.mutable_data_ptr<float>(),
                                        static_cast<size_t>(t.numel()));
    if (dtype != io::DType::kF32) halves.push_back(io::ConvertF32(values, dtype));
    if (dtype == io::DType::kF16 && std::any_of(values.begin(), values.end(), [](float v) {
          return std::isfinite(v) && std::abs(v) > kMaxF16;
        })) {
      Fail("convert.hf", "{}: {} has values beyond {} for F16. Hint: --type bf16 or f32", dir, name,
           kMaxF16);
    }
    tensors.push_back({name, dtype, t.sizes().vec(),
                       dtype == io::DType::kF32 ? std::as_bytes(values)
                                                : std::span<const std::byte>(halves.back())});
  });
  io::WriteSafetensors(dir + "/model.safetensors", tensors);
}

}  // namespace

void WriteHfDirectory(model::Model& model, const std::string& source, const std::string& dir,
                      const HfOptions& options) {
  const bool of_family = IsOfFamily(model.config);
  const model::ModelConfig config = of_family ? model.config : AsDetour(model.config, source);
  Json json = ConfigToJson(config);
  json.erase("dtype");  // the newer name of the same key
  json["torch_dtype"] = options.dtype == io::DType::kF32   ? "float32"
                        : options.dtype == io::DType::kF16 ? "float16"
                                                           : "bfloat16";
  if (!of_family) {
    json["model_type"] = "detour";
    json["architectures"] = {"DetourForCausalLM"};
    json["auto_map"] = {{"AutoConfig", "configuration_detour.DetourConfig"},
                        {"AutoModelForCausalLM", "modeling_detour.DetourForCausalLM"}};
    io::WriteFile(dir + "/configuration_detour.py", kConfigurationPy);
    io::WriteFile(dir + "/modeling_detour.py", kModelingPy);
  }
  const bool has_tokenizer = options.tokenizer && WriteTokenizerFiles(source, dir);
  AddEnds(has_tokenizer ? data::Tokenizer::Load(dir).get() : nullptr, &json);
  const fs::path generation = fs::path(source) / "generation_config.json";
  if (fs::exists(generation)) {
    io::WriteFile(dir + "/generation_config.json", io::ReadFile(generation.string(), 1 << 24));
  }
  io::WriteFile(dir + "/config.json", json.dump(2) + "\n");
  WriteWeights(model, config, dir, options.dtype);
}

}  // namespace detour::convert
