#include "convert/gguf_layout.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "model/rope.h"

namespace detour::convert {
namespace {

constexpr GgufArchitecture kArchitectures[] = {{"llama", true}, {"qwen2", false}, {"qwen3", false}};

constexpr std::pair<std::string_view, std::string_view> kModelNames[] = {
    {"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}};
constexpr std::pair<std::string_view, std::string_view> kLayerNames[] = {
    {"input_layernorm", "attn_norm"},    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},      {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"}, {"self_attn.q_norm", "attn_q_norm"},
    {"self_attn.k_norm", "attn_k_norm"}, {"post_attention_layernorm", "ffn_norm"},
    {"mlp.gate_proj", "ffn_gate"},       {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"}};
constexpr std::string_view kLayers = "model.layers.";

}  // namespace

const GgufArchitecture* FindArchitecture(std::string_view name) {
  const auto it = std::find_if(std::begin(kArchitectures), std::end(kArchitectures),
                               [&](const GgufArchitecture& a) { return a.name == name; });
  return it == std::end(kArchitectures) ? nullptr : it;
}

std::string KnownArchitectures() {
  std::string names;
  for (const GgufArchitecture& a : kArchitectures) {
    names += (names.empty() ? "" : ", ") + std::string(a.name);
  }
  return names;
}

std::string GgufName(std::string_view name) {
  const size_t dot = name.rfind('.');
  if (dot == std::string_view::npos) return "";
  std::string_view stem = name.substr(0, dot);
  const std::string_view kind = name.substr(dot);  // ".weight" or ".bias"
  for (const auto& [ours, theirs] : kModelNames) {
    if (stem == ours) return fmt::format("{}{}", theirs, kind);
  }
  if (!stem.starts_with(kLayers)) return "";
  stem.remove_prefix(kLayers.size());
  const size_t end = stem.find('.');
  if (end == std::string_view::npos) return "";
  for (const auto& [ours, theirs] : kLayerNames) {
    if (stem.substr(end + 1) == ours) {
      return fmt::format("blk.{}.{}{}", stem.substr(0, end), theirs, kind);
    }
  }
  return "";
}

int64_t ReorderedHeads(const model::ModelConfig& config, std::string_view name) {
  if (name.find(".self_attn.q_proj.") != std::string_view::npos) return config.num_heads;
  if (name.find(".self_attn.k_proj.") != std::string_view::npos) return config.num_kv_heads;
  return 0;
}

void ReorderToOurs(std::span<float> values, int64_t num_heads, int64_t head_rows) {
  const int64_t head_size = std::ssize(values) / num_heads, row_size = head_size / head_rows;
  std::vector<float> head(head_size);
  for (int64_t h = 0; h < num_heads; ++h) {
    const std::span<float> rows = values.subspan(h * head_size, head_size);
    std::copy(rows.begin(), rows.end(), head.begin());
    for (int64_t r = 0; r < head_rows; ++r) {
      std::copy_n(head.begin() + r * row_size, row_size,
                  rows.begin() + OurRow(r, head_rows) * row_size);
    }
  }
}

std::vector<float> RopeFactors(const model::ModelConfig& config) {
  model::ModelConfig plain = config;
  plain.rope_scaling = {};
  const std::vector<float> before = FrequenciesOf(plain).inverse;
  std::vector<float> factors = FrequenciesOf(config).inverse;
  for (size_t i = 0; i < factors.size(); ++i) factors[i] = before[i] / factors[i];
  return factors;
}

}  // namespace detour::convert
