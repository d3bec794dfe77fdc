// The shape of a model, read from and written to a Hugging Face config.json.
#pragma once

#include <cstdint>
#include <string>

#include "core/json.h"
#include "routing/router.h"

namespace detour::model {

/// A Llama-family decoder. Letters as in docs: D hidden, F ffn, H heads, G kv heads, K head_dim, L
/// layers, V vocab.
struct ModelConfig {
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  int32_t num_layers = 0;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t max_position_embeddings = 2048;
  double rms_norm_eps = 1e-5, rope_theta = 10000.0;
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
/// Whether layer `layer` has an MLP that every row takes beside its experts.
bool HasSharedExpert(const ModelConfig& config, int32_t layer);
/// The layer whose attention, MLP and norms layer `layer` uses: its own (and at most `layer`)
/// unless a method shares them.
int32_t WeightsLayer(const ModelConfig& config, int32_t layer);
routing::Shape RouterShape(const ModelConfig& config);
/// Checks that no two routers of a layer govern the same span, and that methods fit one another.
/// Error("config") otherwise.
void CheckRouting(const ModelConfig& config, const std::string& name);

/// Reads a Llama config with ours (`routing`) or the public DTRNet code's (`dtrnet_layers`: the
/// DENSE layers) extension. Old and new key names (rope_theta / rope_parameters, torch_dtype /
/// dtype). Errors, one line: unknown key, wrong type, sizes out of range or inconsistent, features
/// this engine does not compute (rope scaling, biases, other activations).
ModelConfig ParseConfig(const Json& json, const std::string& name);
ModelConfig LoadConfig(const std::string& path);  ///< a config.json or a directory with one
Json ConfigToJson(const ModelConfig& config);

/// The dense model of the same shape.
ModelConfig DenseTwin(const ModelConfig& config);

}  // namespace detour::model
