#include "model/config.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <set>

#include "core/error.h"
#include "io/atomic.h"
#include "ops/attention.h"
#include "routing/registry.h"

namespace detour::model {

namespace {

// Keys that this engine computes with.
constexpr std::array<std::string_view, 22> kRead = {"model_type",
                                                    "architectures",
                                                    "vocab_size",
                                                    "hidden_size",
                                                    "intermediate_size",
                                                    "num_hidden_layers",
                                                    "num_attention_heads",
                                                    "num_key_value_heads",
                                                    "head_dim",
                                                    "max_position_embeddings",
                                                    "rms_norm_eps",
                                                    "rope_theta",
                                                    "rope_parameters",
                                                    "rope_scaling",
                                                    "tie_word_embeddings",
                                                    "initializer_range",
                                                    "hidden_act",
                                                    "attention_bias",
                                                    "mlp_bias",
                                                    "routing",
                                                    "dtrnet_layers",
                                                    "aux_loss_coeff"};
// Keys that transformers writes and that change nothing here; kept and written back.
constexpr std::array<std::string_view, 17> kKept = {"bos_token_id",
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
                                                    "_attn_implementation"};

constexpr std::array<std::string_view, 2> kRopeKeys = {"rope_type", "rope_theta"};

void ParseRope(const Json& json, const std::string& name, ModelConfig* config) {
  config->rope_theta = GetDoubleOr(json, "rope_theta", name, 10000.0, 1.0, 1e12);
  // transformers 5 writes rope_parameters; older ones rope_scaling (null: none) beside rope_theta.
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (!HasKey(json, key, name)) continue;
    const std::string where = name + " " + key;
    const Json& rope = json.at(key);
    const std::string type = GetStringOr(rope, "rope_type", where, "default");
    if (type != "default") {
      Fail("config",
           "{}: rope_type: expected \"default\", got \"{}\": scaled positions are not "
           "computed by this version",
           where, Printable(type));
    }
    CheckKnownKeys(rope, kRopeKeys, where);
    config->rope_theta = GetDoubleOr(rope, "rope_theta", where, config->rope_theta, 1.0, 1e12);
  }
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
    return;
  }
  if (!HasKey(json, "routing", name)) return;
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

void RefuseUnsupported(const Json& json, const std::string& name) {
  const std::string type = GetStringOr(json, "model_type", name, "llama");
  if (type != "llama") {
    Fail("config", "{}: model_type: expected \"llama\", got \"{}\"", name, Printable(type));
  }
  const std::string act = GetStringOr(json, "hidden_act", name, "silu");
  if (act != "silu") {
    Fail("config", "{}: hidden_act: expected \"silu\", got \"{}\"", name, Printable(act));
  }
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (GetBoolOr(json, key, name, false)) {
      Fail("config", "{}: {}: expected false, got true: biases are not computed by this version",
           name, key);
    }
  }
}

}  // namespace

ModelConfig ParseConfig(const Json& json, const std::string& name) {
  std::vector<std::string_view> known(kRead.begin(), kRead.end());
  known.insert(known.end(), kKept.begin(), kKept.end());
  CheckKnownKeys(json, known, name);
  RefuseUnsupported(json, name);

  ModelConfig c;
  c.vocab_size = GetInt(json, "vocab_size", name, 1, 1 << 24);
  c.hidden_size = GetInt(json, "hidden_size", name, 1, 1 << 17);
  c.intermediate_size = GetInt(json, "intermediate_size", name, 1, 1 << 19);
  c.num_layers = static_cast<int32_t>(GetInt(json, "num_hidden_layers", name, 1, 1024));
  c.num_heads = GetInt(json, "num_attention_heads", name, 1, 4096);
  c.num_kv_heads = GetIntOr(json, "num_key_value_heads", name, c.num_heads, 1, c.num_heads);
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
  ParseRope(json, name, &c);
  ParseRoutings(json, name, &c);
  for (std::string_view key : kKept) {
    if (json.contains(key)) c.extra[std::string(key)] = json.at(key);
  }
  return c;
}

ModelConfig LoadConfig(const std::string& path) {
  const std::string file = std::filesystem::is_directory(path) ? path + "/config.json" : path;
  return ParseConfig(ParseJson(io::ReadFile(file, 1 << 24), file), file);
}

Json ConfigToJson(const ModelConfig& c) {
  Json json = {{"architectures", {"LlamaForCausalLM"}},
               {"model_type", "llama"},
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
  for (const auto& [key, value] : c.extra.items()) json[key] = value;
  Json methods = Json::array();
  for (const routing::RoutingConfig& r : c.routing) methods.push_back(routing::RoutingToJson(r));
  if (!methods.empty()) json["routing"] = methods.size() == 1 ? methods[0] : methods;
  return json;
}

std::string MethodName(const ModelConfig& config) {
  std::string name;
  for (const routing::RoutingConfig& r : config.routing) {
    name += (name.empty() ? "" : "+") + r.method;
  }
  return name.empty() ? "dense" : name;
}

std::vector<int32_t> RoutedLayers(const ModelConfig& config) {
  std::set<int32_t> layers;
  for (const routing::RoutingConfig& r : config.routing) {
    layers.insert(r.layers.begin(), r.layers.end());
  }
  return {layers.begin(), layers.end()};
}

bool HasRouter(const ModelConfig& config, int32_t layer, routing::Site site) {
  for (const routing::RoutingConfig& r : config.routing) {
    const std::vector<routing::Site>& sites = routing::FindMethod(r.method).sites;
    if (r.HasLayer(layer) && std::find(sites.begin(), sites.end(), site) != sites.end()) {
      return true;
    }
  }
  return false;
}

std::vector<RouterId> Routers(const ModelConfig& config) {
  std::vector<RouterId> routers;
  for (int32_t l : RoutedLayers(config)) {
    bool first = true;
    for (const auto site : {routing::Site::kLayer, routing::Site::kMixer, routing::Site::kFfn}) {
      if (!HasRouter(config, l, site)) continue;
      routers.push_back({l, site,
                         first ? fmt::format("layer{}", l)
                               : fmt::format("layer{}.{}", l, routing::SiteName(site))});
      first = false;
    }
  }
  return routers;
}

bool HasSharedExpert(const ModelConfig& config, int32_t layer) {
  for (const routing::RoutingConfig& r : config.routing) {
    if (r.HasLayer(layer) && r.options.value("shared_expert", false)) return true;
  }
  return false;
}

int32_t WeightsLayer(const ModelConfig& config, int32_t layer) {
  for (const routing::RoutingConfig& r : config.routing) {
    const auto weights_layer = routing::FindMethod(r.method).weights_layer;
    if (weights_layer && r.HasLayer(layer)) return weights_layer(r, layer);
  }
  return layer;
}

routing::Shape RouterShape(const ModelConfig& c) {
  return {c.hidden_size, c.vocab_size, c.num_layers, c.rms_norm_eps};
}

void CheckRouting(const ModelConfig& config, const std::string& name) {
  std::map<std::pair<int32_t, routing::Site>, std::string> taken;
  for (const routing::RoutingConfig& r : config.routing) {
    for (const routing::Site site : routing::FindMethod(r.method).sites) {
      for (const int32_t l : r.layers) {
        const auto [it, added] = taken.emplace(std::pair(l, site), r.method);
        if (!added) {
          Fail("config", "{}: routing: {} and {} both decide for the {} of layer {}", name,
               it->second, r.method, routing::SiteName(site), l);
        }
      }
    }
  }
  for (int32_t l = 0; l < config.num_layers; ++l) {
    const int32_t source = WeightsLayer(config, l);
    for (const routing::RoutingConfig& r : config.routing) {
      if (source != l && r.options.contains("experts") && (r.HasLayer(l) || r.HasLayer(source))) {
        Fail("config",
             "{}: routing: layer {} uses the weights of layer {}, which experts of {} are no part "
             "of. Hint: {} on other layers",
             name, l, source, r.method, r.method);
      }
    }
  }
  for (const routing::RoutingConfig& r : config.routing) {
    const bool asks = r.TextOr("estimator", "").ends_with("ste") &&
                      routing::FindMethod(r.method).sites[0] == routing::Site::kLayer;
    for (const int32_t l : r.layers) {
      if (asks &&
          (taken.count({l, routing::Site::kMixer}) || taken.count({l, routing::Site::kFfn}))) {
        Fail("config",
             "{}: routing: {} with estimator {} asks what rows left out would have got from layer "
             "{}, which another method's router would have to decide. Hint: estimator prob_gate or "
             "soft, or other layers",
             name, r.method, r.Text("estimator"), l);
      }
    }
  }
}

ModelConfig DenseTwin(const ModelConfig& config) {
  ModelConfig twin = config;
  twin.routing = {};
  return twin;
}

}  // namespace detour::model
