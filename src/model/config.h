// The shape of a model, read from and written to a Hugging Face config.json.
#pragma once

#include <cstdint>
#include <string>

#include "core/json.h"
#include "routing/router.h"

namespace detour::model {

/// How rotary frequencies are stretched beyond the length a model was first trained on.
struct RopeScaling {
  std::string type = "default";  ///< default, linear, dynamic, llama3, yarn
  double factor = 1, low_freq_factor = 1, high_freq_factor = 4;
  double attention_factor = 1, beta_fast = 32, beta_slow = 1;  ///< yarn
  bool truncate = true;                                        ///< yarn
  int64_t original_max = 0;                                    ///< positions of the first training
};

/// A Llama-family decoder. Letters as in docs: D hidden, F ffn, H heads, G kv heads, K head_dim, L
/// layers, V vocab.
struct ModelConfig {
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  int32_t num_layers = 0;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t max_position_embeddings = 2048;
  double rms_norm_eps = 1e-5, rope_theta = 10000.0;
  std::string model_type = "llama";  ///< of transformers: names of weights and keys
  RopeScaling rope_scaling;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool qk_norm = false;                   ///< RMSNorm of each query and key head before rotation
  std::vector<uint8_t> without_rotation;  ///< by layer; empty: none
  int64_t sliding_window = 0;             ///< tokens that sliding layers see, themselves included
  std::vector<uint8_t> slides;            ///< by layer; empty: none
  bool tie_word_embeddings = false;
  double initializer_range = 0.02;
  /// Attention stays inside documents (packed training batches); off: inside sequences.
  bool document_attention = true;
  std::vector<routing::RoutingConfig> routing;  ///< empty: dense
  Json extra = Json::object();  ///< keys kept for writing back (bos_token_id, eos_token_id, …)
};

/// "dense", or the methods' names joined with "+".
std::string MethodName(const ModelConfig& config);
/// Layers with at least one router, ascending.
std::vector<int32_t> RoutedLayers(const ModelConfig& config);
/// A router of a model. Its name is "layerN" if it is the layer's first, else "layerN.SITE".
struct RouterId {
  int32_t layer;
  routing::Site site;
  std::string name;
};
/// All routers, by layer, then site.
std::vector<RouterId> Routers(const ModelConfig& config);
/// Whether a router of layer `layer` governs `site`.
bool HasRouter(const ModelConfig& config, int32_t layer, routing::Site site);
/// The window in which all rows of a layer attend; 0: none.
int64_t SlidingWindow(const ModelConfig& config, int32_t layer);
/// Widths of a layer's MLPs: of each expert (0: no experts), and of the MLP that every row takes
/// (0: none); and whether a gate of its own weighs the latter beside experts.
struct MlpShape {
  int64_t num_experts = 0, expert_size = 0, size = 0;
  bool gated = false;
};
MlpShape MlpShapeOf(const ModelConfig& config, int32_t layer);
/// The layer whose attention, MLP and norms layer `layer` uses: its own (and at most `layer`)
/// unless a method shares them.
int32_t WeightsLayer(const ModelConfig& config, int32_t layer);
routing::Shape RouterShape(const ModelConfig& config);
/// Checks that no two routers of a layer govern the same span, and that methods fit one another.
/// Error("config") otherwise.
void CheckRouting(const ModelConfig& config, const std::string& name);

/// Reads a config of llama, mistral, qwen2, qwen3, smollm3, mixtral, qwen2_moe or qwen3_moe, with
/// ours (`routing`) or the public DTRNet code's (`dtrnet_layers`: the DENSE layers) extension. Old
/// and new key names (rope_theta / rope_scaling / rope_parameters, torch_dtype / dtype). Experts
/// of a family become the method moe. Errors, one line: unknown key, wrong type, sizes out of range
/// or inconsistent, features this engine does not compute. (families.cc)
ModelConfig ParseConfig(const Json& json, const std::string& name);
ModelConfig LoadConfig(const std::string& path);  ///< a config.json or a directory with one
Json ConfigToJson(const ModelConfig& config);
/// The name that a file of the config's family has for our tensor `name`, and its class of
/// transformers. (families.cc)
std::string FileName(const ModelConfig& config, const std::string& name);
std::string Architecture(const std::string& model_type);

/// The dense model of the same shape.
ModelConfig DenseTwin(const ModelConfig& config);

}  // namespace detour::model
