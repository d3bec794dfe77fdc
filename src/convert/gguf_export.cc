#include "convert/gguf_export.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <utility>

#include "convert/gguf_layout.h"
#include "convert/gguf_vocab.h"
#include "convert/load.h"
#include "core/error.h"

namespace detour::convert {
namespace {

/// The architecture that computes a model, or an Error that says why none does.
const GgufArchitecture& ArchitectureOf(const model::ModelConfig& c, const std::string& source) {
  const auto refuse = [&](const std::string& what) {
    Fail("convert.gguf", "{}: {}. Hint: --to hf", source, what);
  };
  if (!c.routing.empty()) {
    refuse(fmt::format("GGUF files hold dense models, this one is {}", MethodName(c)));
  }
  if (!c.slides.empty()) refuse("a model with sliding windows cannot be written as GGUF");
  // Without its window a Mistral is a Llama.
  const GgufArchitecture* architecture =
      FindArchitecture(c.model_type == "mistral" ? "llama" : c.model_type);
  if (!architecture) {
    refuse(fmt::format("only llama, mistral, qwen2 and qwen3 can be written as GGUF, this is {}",
                       c.model_type));
  }
  if (c.model_type.starts_with("qwen") && (c.o_bias || c.mlp_bias)) {
    refuse("this family's GGUF files have no bias of the attention's output");
  }
  const model::RopeScaling& r = c.rope_scaling;
  if (r.type == "yarn" &&
      (!r.truncate || std::abs(r.attention_factor - (0.1 * std::log(r.factor) + 1)) > 1e-6)) {
    refuse("yarn rotary positions with truncate or attention_factor of their own");
  }
  return *architecture;
}

GgufMetadata ShapeToGguf(const model::ModelConfig& c, const std::string& architecture,
                         const std::string& name, io::GgufType type) {
  const uint32_t file_type = type == io::GgufType::kF32 ? 0 : type == io::GgufType::kF16 ? 1 : 7;
  GgufMetadata out = {{"general.architecture", architecture},
                      {"general.type", std::string("model")},
                      {"general.name", name},
                      {"general.file_type", file_type}};
  if (type == io::GgufType::kQ8_0) out.emplace_back("general.quantization_version", uint32_t{2});
  const auto add = [&](const char* key, io::GgufData value) {
    out.emplace_back(architecture + "." + key, std::move(value));
  };
  const auto count = [&](const char* key, int64_t value) {
    add(key, static_cast<uint32_t>(value));
  };
  const auto number = [&](const char* key, double value) { add(key, static_cast<float>(value)); };
  count("vocab_size", c.vocab_size);
  count("context_length", c.max_position_embeddings);
  count("embedding_length", c.hidden_size);
  count("block_count", c.num_layers);
  count("feed_forward_length", c.intermediate_size);
  count("attention.head_count", c.num_heads);
  count("attention.head_count_kv", c.num_kv_heads);
  count("attention.key_length", c.head_dim);
  count("attention.value_length", c.head_dim);
  number("attention.layer_norm_rms_epsilon", c.rms_norm_eps);
  count("rope.dimension_count", c.head_dim);
  number("rope.freq_base", c.rope_theta);
  const model::RopeScaling& r = c.rope_scaling;
  if (r.type == "linear" || r.type == "yarn") {
    add("rope.scaling.type", r.type);
    number("rope.scaling.factor", r.factor);
  }
  if (r.type == "yarn" || r.type == "llama3") {
    count("rope.scaling.original_context_length", r.original_max);
  }
  if (r.type == "yarn" && (r.beta_fast != 32 || r.beta_slow != 1)) {
    number("rope.scaling.yarn_beta_fast", r.beta_fast);
    number("rope.scaling.yarn_beta_slow", r.beta_slow);
  }
  return out;
}

io::GgufTensorToWrite TensorToGguf(const std::string& name, const at::Tensor& t, io::GgufType type,
                                   int64_t reordered_heads, int64_t head_dim) {
  io::GgufTensorToWrite out{.name = GgufName(name), .type = type, .shape = t.sizes().vec()};
  if (t.dim() == 1) {
    out.type = io::GgufType::kF32;
  } else if (t.size(-1) % io::GgufTypeOf(type).block_size != 0) {
    out.type = io::GgufType::kF16;
  }
  const float* data = t.const_data_ptr<float>();
  if (reordered_heads == 0) {
    out.read = [data](int64_t begin, std::span<float> values) {
      std::copy_n(data + begin, values.size(), values.begin());
    };
    return out;
  }
  const int64_t row_size = t.numel() / (reordered_heads * head_dim);
  out.read = [=](int64_t begin, std::span<float> values) {
    for (int64_t i = 0; i < std::ssize(values); i += row_size) {
      const int64_t row = OurRow((begin + i) / row_size, head_dim);
      std::copy_n(data + row * row_size, row_size, values.begin() + i);
    }
  };
  return out;
}

}  // namespace

void WriteGgufModel(model::Model& model, const std::string& source, const std::string& path,
                    const GgufOptions& options) {
  const model::ModelConfig& c = model.config;
  const GgufArchitecture& architecture = ArchitectureOf(c, source);
  std::string name = std::filesystem::path(source).lexically_normal().stem().string();
  if (name.empty() || name == ".") name = "model";
  GgufMetadata metadata = ShapeToGguf(c, architecture.name, name, options.type);
  if (options.tokenizer) {
    GgufMetadata vocab =
        IsGguf(source) ? CopyVocab(io::GgufFile::Open(source)) : VocabToGguf(source, c.vocab_size);
    std::move(vocab.begin(), vocab.end(), std::back_inserter(metadata));
  }
  std::vector<io::GgufTensorToWrite> tensors;
  ForEachTensor(model, [&](const std::string& our_name, at::Tensor& t) {
    const int64_t heads = architecture.pairs_rotate ? ReorderedHeads(c, our_name) : 0;
    tensors.push_back(TensorToGguf(our_name, t, options.type, heads, c.head_dim));
  });
  std::vector<float> factors;
  if (c.rope_scaling.type == "llama3") {
    factors = RopeFactors(c);
    tensors.push_back({.name = "rope_freqs.weight",
                       .shape = {std::ssize(factors)},
                       .read = [&](int64_t begin, std::span<float> values) {
                         std::copy_n(factors.begin() + begin, values.size(), values.begin());
                       }});
  }
  io::WriteGguf(path, metadata, tensors);
}

}  // namespace detour::convert
