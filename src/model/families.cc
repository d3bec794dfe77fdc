// Config files of the families that transformers knows, and what they call weights.
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <span>

#include "core/error.h"
#include "io/atomic.h"
#include "model/config.h"
#include "ops/attention.h"
#include "routing/registry.h"

namespace detour::model {

namespace {

using Keys = std::span<const std::string_view>;

// Keys that this engine computes with, in every family.
constexpr std::string_view kRead[] = {
    "model_type",        "architectures",     "vocab_size",          "hidden_size",
    "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",          "hidden_act",        "rms_norm_eps",        "max_position_embeddings",
    "rope_theta",        "rope_parameters",   "rope_scaling",        "tie_word_embeddings",
    "initializer_range", "routing",           "dtrnet_layers",       "aux_loss_coeff"};
// Keys that transformers writes and that change nothing here; kept and written back.
constexpr std::string_view kKept[] = {"bos_token_id",
                                      "eos_token_id",
                                      "pad_token_id",
                                      "torch_dtype",
                                      "dtype",
                                      "use_cache",
                                      "pretraining_tp",
                                      "attention_dropout",
                                      "transformers_version",
                                      "_name_or_path",
                                      "return_dict",
                                      "output_hidden_states",
                                      "output_attentions",
                                      "is_encoder_decoder",
                                      "chunk_size_feed_forward",
                                      "problem_type",
                                      "_attn_implementation",
                                      "output_router_logits",
                                      "id2label",
                                      "label2id",
                                      "num_labels",
                                      "unk_token_id",
                                      "_model_name_or_path",
                                      "is_llama_config",
                                      "rope_interleaved",
                                      "transformers.js_config"};
// Keys of single families: read below, and written back as they were.
constexpr std::string_view kLlamaKeys[] = {"attention_bias", "mlp_bias"};
// A directory exported with its Python files (src/convert/hf_export.h): a Llama with routers. What
// points transformers to the files means nothing here.
constexpr const char* kDetourType = "detour";
constexpr std::string_view kMistralKeys[] = {"sliding_window", "layer_types"};
constexpr std::string_view kQwenKeys[] = {"use_sliding_window", "sliding_window", "layer_types",
                                          "max_window_layers", "attention_bias"};
constexpr std::string_view kSmolKeys[] = {
    "use_sliding_window", "sliding_window", "layer_types",    "max_window_layers",
    "attention_bias",     "mlp_bias",       "no_rope_layers", "no_rope_layer_interval"};
constexpr std::string_view kMixtralKeys[] = {"sliding_window",       "layer_types",
                                             "num_local_experts",    "num_experts_per_tok",
                                             "router_aux_loss_coef", "router_jitter_noise"};
constexpr std::string_view kQwenMoeKeys[] = {
    "use_sliding_window",    "sliding_window",
    "layer_types",           "max_window_layers",
    "attention_bias",        "qkv_bias",
    "decoder_sparse_step",   "mlp_only_layers",
    "moe_intermediate_size", "shared_expert_intermediate_size",
    "num_experts",           "num_local_experts",
    "num_experts_per_tok",   "norm_topk_prob",
    "router_aux_loss_coef"};

struct Family {
  const char* model_type;
  const char* architecture;
  Keys keys;
  int64_t num_kv_heads;  ///< where the config does not say; 0: as many as heads
  double rope_theta;     ///< likewise
};
const Family kFamilies[] = {{"llama", "LlamaForCausalLM", kLlamaKeys, 0, 1e4},
                            {"mistral", "MistralForCausalLM", kMistralKeys, 8, 1e4},
                            {"qwen2", "Qwen2ForCausalLM", kQwenKeys, 32, 1e4},
                            {"qwen3", "Qwen3ForCausalLM", kQwenKeys, 32, 1e4},
                            {"smollm3", "SmolLM3ForCausalLM", kSmolKeys, 4, 2e6},
                            {"mixtral", "MixtralForCausalLM", kMixtralKeys, 8, 1e6},
                            {"qwen2_moe", "Qwen2MoeForCausalLM", kQwenMoeKeys, 16, 1e4},
                            {"qwen3_moe", "Qwen3MoeForCausalLM", kQwenMoeKeys, 4, 1e4}};

const Family& FindFamily(const std::string& model_type, const std::string& name) {
  std::string known;
  for (const Family& f : kFamilies) {
    if (model_type == f.model_type) return f;
    known += (known.empty() ? "" : ", ") + std::string(f.model_type);
  }
  Fail("config", "{}: model_type: expected one of {}, got \"{}\"", name, known,
       Printable(model_type));
}

constexpr std::string_view kRopeKeys[] = {"rope_type",
                                          "type",
                                          "rope_theta",
                                          "factor",
                                          "low_freq_factor",
                                          "high_freq_factor",
                                          "beta_fast",
                                          "beta_slow",
                                          "truncate",
                                          "attention_factor",
                                          "mscale",
                                          "mscale_all_dim",
                                          "original_max_position_embeddings"};

/// rope_type and its numbers; as transformers computes them (modeling_rope_utils).
void ParseScaling(const Json& rope, const std::string& where, ModelConfig* config) {
  RopeScaling& r = config->rope_scaling;
  r.type = GetStringOr(rope, "rope_type", where, GetStringOr(rope, "type", where, "default"));
  static constexpr std::array kTypes = {"default", "linear", "dynamic", "llama3", "yarn"};
  if (std::find(kTypes.begin(), kTypes.end(), r.type) == kTypes.end()) {
    Fail("config", "{}: rope_type: expected default, linear, dynamic, llama3 or yarn, got \"{}\"",
         where, Printable(r.type));
  }
  if (r.type == "default") {
    static constexpr std::string_view kPlain[] = {"rope_type", "type", "rope_theta"};
    return CheckKnownKeys(rope, kPlain, where);
  }
  r.original_max = GetIntOr(rope, "original_max_position_embeddings", where,
                            config->max_position_embeddings, 1, 1 << 26);
  const double stretch =
      static_cast<double>(config->max_position_embeddings) / static_cast<double>(r.original_max);
  r.factor = r.type == "yarn" ? GetDoubleOr(rope, "factor", where, stretch, 1.0, 1e6)
                              : GetDouble(rope, "factor", where, 1.0, 1e6);
  if (r.type == "llama3") {
    r.low_freq_factor = GetDouble(rope, "low_freq_factor", where, 1e-6, 1e6);
    r.high_freq_factor = GetDouble(rope, "high_freq_factor", where, 1e-6, 1e6);
  }
  if (r.type != "yarn") return;
  r.beta_fast = GetDoubleOr(rope, "beta_fast", where, 32, 1e-6, 1e6);
  r.beta_slow = GetDoubleOr(rope, "beta_slow", where, 1, 1e-6, 1e6);
  r.truncate = GetBoolOr(rope, "truncate", where, true);
  const auto mscale = [&](double m) {
    return r.factor <= 1 ? 1 : 0.1 * m * std::log(r.factor) + 1;
  };
  const double m = GetDoubleOr(rope, "mscale", where, 0, 0, 1e6);
  const double all = GetDoubleOr(rope, "mscale_all_dim", where, 0, 0, 1e6);
  r.attention_factor =
      GetDoubleOr(rope, "attention_factor", where,
                  m > 0 && all > 0 ? mscale(m) / mscale(all) : mscale(1), 1e-6, 1e6);
}

void ParseRope(const Json& json, const std::string& name, const Family& family,
               ModelConfig* config) {
  config->rope_theta = GetDoubleOr(json, "rope_theta", name, family.rope_theta, 1.0, 1e12);
  // transformers 5 writes rope_parameters; older ones rope_scaling (null: none) beside rope_theta.
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!HasKey(json, key, name)) continue;
    const std::string where = name + " " + key;
    const Json& rope = json.at(key);
    CheckKnownKeys(rope, kRopeKeys, where);
    ParseScaling(rope, where, config);
    config->rope_theta = GetDoubleOr(rope, "rope_theta", where, config->rope_theta, 1.0, 1e12);
  }
}

/// Which layers attend in the sliding window only.
void ParseSliding(const Json& json, const std::string& name, ModelConfig* c) {
  const std::string& type = c->model_type;
  const bool always = type == "mistral" || type == "mixtral";
  if (type == "llama" || (!always && !GetBoolOr(json, "use_sliding_window", name, false))) return;
  c->sliding_window =
      GetIntOr(json, "sliding_window", name,
               json.contains("sliding_window") || type == "mixtral" ? 0 : 4096, 0, 1 << 26);
  // A window as long as the context is none.
  if (c->sliding_window == 0 || c->sliding_window >= c->max_position_embeddings) {
    c->sliding_window = 0;
    return;
  }
  c->slides.assign(c->num_layers, 1);
  if (HasKey(json, "layer_types", name)) {
    const Json& types = json.at("layer_types");
    if (!types.is_array() || std::ssize(types) != c->num_layers) {
      Fail("config", "{}: layer_types: expected one text for each of {} layers", name,
           c->num_layers);
    }
    for (int32_t l = 0; l < c->num_layers; ++l) {
      const bool slides = types[l] == "sliding_attention";
      if (!slides && types[l] != "full_attention") {
        Fail("config", "{}: layer_types: expected full_attention or sliding_attention, got {}",
             name, Printable(types[l].dump()));
      }
      c->slides[l] = slides;
    }
  } else if (!always) {
    const int64_t first = GetIntOr(json, "max_window_layers", name, 28, 0, 1 << 20);
    for (int64_t l = 0; l < c->num_layers; ++l) c->slides[l] = l >= first;
  }
}

void ParseAttention(const Json& json, const std::string& name, ModelConfig* c) {
  const std::string& type = c->model_type;
  if (type == "qwen2") {
    c->qkv_bias = true;
  } else if (type == "qwen2_moe") {
    c->qkv_bias = GetBoolOr(json, "qkv_bias", name, true);
  } else if (type != "mistral" && type != "mixtral") {
    c->qkv_bias = c->o_bias = GetBoolOr(json, "attention_bias", name, false);
  }
  c->mlp_bias = (type == "llama" || type == "smollm3") && GetBoolOr(json, "mlp_bias", name, false);
  c->qk_norm = type.starts_with("qwen3");
  if (type == "smollm3") {
    // 1 where a layer HAS rotation, despite the key's name.
    const int64_t interval = GetIntOr(json, "no_rope_layer_interval", name, 4, 1, 1 << 20);
    std::vector<int64_t> rotates;
    if (HasKey(json, "no_rope_layers", name)) {
      rotates = GetInts(json, "no_rope_layers", name, 0, 1);
    } else {
      for (int64_t l = 0; l < c->num_layers; ++l) rotates.push_back((l + 1) % interval != 0);
    }
    if (std::ssize(rotates) != c->num_layers) {
      Fail("config", "{}: no_rope_layers: expected {} numbers, one a layer, got {}", name,
           c->num_layers, rotates.size());
    }
    for (const int64_t r : rotates) c->without_rotation.push_back(r == 0);
  }
}

/// The experts that a family always has, as the method moe.
void AddFamilyExperts(const Json& json, const std::string& name, ModelConfig* c) {
  const std::string& type = c->model_type;
  Json moe = {{"method", "moe"}, {"layers", Json::array()}};
  std::vector<int64_t> dense;
  int64_t step = 1;
  if (type == "mixtral") {
    moe["experts"] = GetIntOr(json, "num_local_experts", name, 8, 1, 4096);
    moe["top_k"] = GetIntOr(json, "num_experts_per_tok", name, 2, 1, 64);
    moe["jitter"] = GetDoubleOr(json, "router_jitter_noise", name, 0, 0, 0.5);
  } else if (type == "qwen2_moe" || type == "qwen3_moe") {
    const bool two = type == "qwen2_moe";
    moe["experts"] =
        GetIntOr(json, "num_experts", name,
                 GetIntOr(json, "num_local_experts", name, two ? 60 : 128, 1, 4096), 1, 4096);
    moe["top_k"] = GetIntOr(json, "num_experts_per_tok", name, two ? 4 : 8, 1, 64);
    moe["normalize"] = GetBoolOr(json, "norm_topk_prob", name, false);
    moe["expert_size"] =
        GetIntOr(json, "moe_intermediate_size", name, two ? 1408 : 768, 1, 1 << 19);
    if (two) {
      moe["shared_expert"] = moe["shared_gate"] = true;
      moe["shared_size"] =
          GetIntOr(json, "shared_expert_intermediate_size", name, 5632, 1, 1 << 19);
    }
    step = GetIntOr(json, "decoder_sparse_step", name, 1, 1, 1 << 20);
    if (HasKey(json, "mlp_only_layers", name)) {
      dense = GetInts(json, "mlp_only_layers", name, 0, c->num_layers - 1);
    }
  } else {
    return;
  }
  moe["aux_loss_coeff"] = GetDoubleOr(json, "router_aux_loss_coef", name, 0.001, 0, 1e3);
  for (int64_t l = 0; l < c->num_layers; ++l) {
    const bool is_dense = std::find(dense.begin(), dense.end(), l) != dense.end();
    if (!is_dense && (l + 1) % step == 0) moe["layers"].push_back(l);
  }
  if (moe["layers"].empty()) return;
  c->routing.push_back(routing::ParseRouting(moe, name, c->num_layers));
  c->routing.back().of_family = true;
}

/// `routing`: an object, or a list of objects whose methods share layers. Or the public DTRNet
/// code's `dtrnet_layers`.
void ParseRoutings(const Json& json, const std::string& name, ModelConfig* config) {
  if (HasKey(json, "dtrnet_layers", name)) {
    if (HasKey(json, "routing", name)) {
      Fail("config", "{}: expected routing or dtrnet_layers, got both", name);
    }
    // The public code lists the layers that stay DENSE.
    const std::vector<int64_t> dense =
        GetInts(json, "dtrnet_layers", name, 0, config->num_layers - 1);
    Json layers = Json::array();
    for (int32_t l = 0; l < config->num_layers; ++l) {
      if (std::find(dense.begin(), dense.end(), l) == dense.end()) layers.push_back(l);
    }
    const Json object = {
        {"method", "dtrnet"},
        {"layers", layers},
        {"aux_loss_coeff", GetDoubleOr(json, "aux_loss_coeff", name, 8e-4, 0.0, 1e6)}};
    config->routing.push_back(routing::ParseRouting(object, name, config->num_layers));
    CheckRouting(*config, name);
    return;
  }
  if (!HasKey(json, "routing", name)) return CheckRouting(*config, name);
  const Json& routing = json.at("routing");
  const Json objects = routing.is_array() ? routing : Json::array({routing});
  if (objects.size() > 4) {
    Fail("config", "{}: routing: expected at most 4 methods, got {}", name, objects.size());
  }
  for (const Json& object : objects) {
    routing::RoutingConfig parsed =
        routing::ParseRouting(object, name + " routing", config->num_layers);
    if (parsed.method != "dense") config->routing.push_back(std::move(parsed));
  }
  CheckRouting(*config, name);
}

Json ScalingToJson(const RopeScaling& r) {
  Json json = {{"rope_type", r.type}, {"factor", r.factor}};
  if (r.type == "llama3") {
    json["low_freq_factor"] = r.low_freq_factor;
    json["high_freq_factor"] = r.high_freq_factor;
  }
  if (r.type == "llama3" || r.type == "yarn") {
    json["original_max_position_embeddings"] = r.original_max;
  }
  if (r.type == "yarn") {
    json["attention_factor"] = r.attention_factor;
    json["beta_fast"] = r.beta_fast;
    json["beta_slow"] = r.beta_slow;
    json["truncate"] = r.truncate;
  }
  return json;
}

}  // namespace

std::string Architecture(const std::string& model_type) {
  return FindFamily(model_type, "config").architecture;
}

std::string FileName(const ModelConfig& config, const std::string& name) {
  if (config.model_type != "qwen2_moe" && config.model_type != "qwen3_moe") return name;
  // Ours are Mixtral's.
  static constexpr std::pair<const char*, const char*> kParts[] = {
      {"block_sparse_moe.", "mlp."},
      {".w1.weight", ".gate_proj.weight"},
      {".w2.weight", ".down_proj.weight"},
      {".w3.weight", ".up_proj.weight"}};
  std::string file_name = name;
  if (name.find(".mlp.") != std::string::npos &&
      name.find("shared_expert_gate") == std::string::npos) {
    const auto layer = std::stoi(name.substr(std::string("model.layers.").size()));
    if (MlpShapeOf(config, layer).num_experts > 0) {
      file_name.replace(file_name.find(".mlp."), 5, ".mlp.shared_expert.");
    }
    return file_name;
  }
  if (name.find("block_sparse_moe.") == std::string::npos) return name;
  for (const auto& [ours, theirs] : kParts) {
    if (const size_t at = file_name.find(ours); at != std::string::npos) {
      file_name.replace(at, std::string_view(ours).size(), theirs);
    }
  }
  return file_name;
}

ModelConfig DenseTwin(const ModelConfig& config) {
  ModelConfig twin = config;
  twin.routing = {};
  if (config.model_type == "mixtral") twin.model_type = "mistral";
  if (config.model_type.ends_with("_moe")) {
    twin.model_type = config.model_type.substr(0, config.model_type.size() - 4);
  }
  twin.extra = Json::object();
  for (const Keys keys : {Keys(kKept), FindFamily(twin.model_type, "config").keys}) {
    for (std::string_view key : keys) {
      if (config.extra.contains(key))
        twin.extra[std::string(key)] = config.extra.at(std::string(key));
    }
  }
  return twin;
}

ModelConfig ParseConfig(const Json& json, const std::string& name) {
  ModelConfig c;
  c.model_type = GetStringOr(json, "model_type", name, "llama");
  const bool exported = c.model_type == kDetourType;
  if (exported) c.model_type = "llama";
  const Family& family = FindFamily(c.model_type, name);
  std::vector<std::string_view> known;
  for (const Keys keys : {Keys(kRead), Keys(kKept), family.keys}) {
    known.insert(known.end(), keys.begin(), keys.end());
  }
  if (exported) known.push_back("auto_map");
  CheckKnownKeys(json, known, name);
  const std::string act = GetStringOr(json, "hidden_act", name, "silu");
  if (act != "silu") {
    Fail("config", "{}: hidden_act: expected \"silu\", got \"{}\"", name, Printable(act));
  }
  if (GetBoolOr(json, "rope_interleaved", name, false)) {
    Fail("config", "{}: rope_interleaved: expected false, got true", name);
  }
  c.vocab_size = GetInt(json, "vocab_size", name, 1, 1 << 24);
  c.hidden_size = GetInt(json, "hidden_size", name, 1, 1 << 17);
  c.intermediate_size = GetInt(json, "intermediate_size", name, 1, 1 << 19);
  c.num_layers = static_cast<int32_t>(GetInt(json, "num_hidden_layers", name, 1, 1024));
  c.num_heads = GetInt(json, "num_attention_heads", name, 1, 4096);
  c.num_kv_heads =
      GetIntOr(json, "num_key_value_heads", name,
               family.num_kv_heads > 0 ? family.num_kv_heads : c.num_heads, 1, c.num_heads);
  if (c.num_heads % c.num_kv_heads != 0) {
    Fail("config", "{}: num_key_value_heads: expected a divisor of num_attention_heads {}, got {}",
         name, c.num_heads, c.num_kv_heads);
  }
  if (!HasKey(json, "head_dim", name) && c.hidden_size % c.num_heads != 0) {
    Fail("config",
         "{}: hidden_size {} is no multiple of num_attention_heads {}, and head_dim is "
         "not set",
         name, c.hidden_size, c.num_heads);
  }
  c.head_dim =
      GetIntOr(json, "head_dim", name, c.hidden_size / c.num_heads, 2, kernels::kMaxHeadDim);
  if (c.head_dim % 2 != 0) {
    Fail("config", "{}: head_dim: expected an even number, got {}", name, c.head_dim);
  }
  c.max_position_embeddings = GetIntOr(json, "max_position_embeddings", name, 2048, 1, 1 << 26);
  c.rms_norm_eps = GetDoubleOr(json, "rms_norm_eps", name, 1e-6, 0.0, 1.0);
  c.tie_word_embeddings = GetBoolOr(json, "tie_word_embeddings", name, false);
  c.initializer_range = GetDoubleOr(json, "initializer_range", name, 0.02, 0.0, 10.0);
  ParseRope(json, name, family, &c);
  ParseSliding(json, name, &c);
  ParseAttention(json, name, &c);
  AddFamilyExperts(json, name, &c);
  ParseRoutings(json, name, &c);
  for (const Keys keys : {Keys(kKept), family.keys}) {
    for (std::string_view key : keys) {
      if (json.contains(key)) c.extra[std::string(key)] = json.at(key);
    }
  }
  return c;
}

ModelConfig LoadConfig(const std::string& path) {
  const std::string file = std::filesystem::is_directory(path) ? path + "/config.json" : path;
  return ParseConfig(ParseJson(io::ReadFile(file, 1 << 24), file), file);
}

Json ConfigToJson(const ModelConfig& c) {
  Json json = {{"architectures", {Architecture(c.model_type)}},
               {"model_type", c.model_type},
               {"vocab_size", c.vocab_size},
               {"hidden_size", c.hidden_size},
               {"intermediate_size", c.intermediate_size},
               {"num_hidden_layers", c.num_layers},
               {"num_attention_heads", c.num_heads},
               {"num_key_value_heads", c.num_kv_heads},
               {"head_dim", c.head_dim},
               {"hidden_act", "silu"},
               {"max_position_embeddings", c.max_position_embeddings},
               {"rms_norm_eps", c.rms_norm_eps},
               {"rope_theta", c.rope_theta},
               {"tie_word_embeddings", c.tie_word_embeddings},
               {"initializer_range", c.initializer_range}};
  if (c.rope_scaling.type != "default") json["rope_scaling"] = ScalingToJson(c.rope_scaling);
  for (const auto& [key, value] : c.extra.items()) json[key] = value;
  Json methods = Json::array();
  for (const routing::RoutingConfig& r : c.routing) {
    if (!r.of_family) methods.push_back(routing::RoutingToJson(r));
  }
  if (!methods.empty()) json["routing"] = methods.size() == 1 ? methods[0] : methods;
  return json;
}

}  // namespace detour::model
