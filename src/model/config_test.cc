#include "model/config.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace detour::model {
namespace {

using Layers = std::vector<int32_t>;

Json Base() {
  return {{"model_type", "llama"},    {"vocab_size", 100},      {"hidden_size", 64},
          {"intermediate_size", 96},  {"num_hidden_layers", 4}, {"num_attention_heads", 4},
          {"num_key_value_heads", 2}, {"rms_norm_eps", 1e-5}};
}

Json With(const char* key, Json value) {
  Json json = Base();
  json[key] = std::move(value);
  return json;
}

ModelConfig Parse(const Json& json) { return ParseConfig(json, "test"); }

TEST(Config, RoundTrip) {
  Json json = Base();
  json["tie_word_embeddings"] = true;
  json["rope_theta"] = 123456.5;
  json["max_position_embeddings"] = 777;
  json["initializer_range"] = 0.01;
  json["head_dim"] = 32;
  json["eos_token_id"] = {2, 3};
  json["dtype"] = "bfloat16";
  json["is_llama_config"] = true;  // as published SmolLM2 has it
  json["rope_interleaved"] = false;
  json["id2label"] = {{"0", "LABEL_0"}};
  json["routing"] = {
      {"method", "dtrnet"}, {"layers", {0, 3}}, {"aux_loss_coeff", 2e-4}, {"fallback_share", 0.2}};
  const ModelConfig a = Parse(json);
  EXPECT_EQ(a.head_dim, 32);
  EXPECT_EQ(a.max_position_embeddings, 777);
  EXPECT_EQ(a.rope_theta, 123456.5);
  EXPECT_TRUE(a.tie_word_embeddings);
  EXPECT_EQ(a.routing.at(0).layers, (Layers{0, 3}));
  EXPECT_EQ(a.routing.at(0).Number("aux_loss_coeff"), 2e-4);
  EXPECT_EQ(a.routing.at(0).Number("fallback_share"), 0.2);
  const Json written = ConfigToJson(a);
  EXPECT_EQ(written.at("eos_token_id"), json.at("eos_token_id"));
  EXPECT_EQ(written.at("dtype"), "bfloat16");
  EXPECT_EQ(written.at("id2label"), json.at("id2label"));
  EXPECT_EQ(ConfigToJson(Parse(written)), written);
  // Through text: no digit is lost.
  EXPECT_EQ(ConfigToJson(Parse(ParseJson(written.dump(), "written"))), written);
}

TEST(Config, DefaultsOfMissingKeys) {
  const ModelConfig c = Parse(Base());
  EXPECT_EQ(c.head_dim, 16);
  EXPECT_EQ(c.rope_theta, 10000.0);
  EXPECT_FALSE(c.tie_word_embeddings);
  EXPECT_TRUE(c.routing.empty());
  EXPECT_EQ(MethodName(c), "dense");
  EXPECT_FALSE(ConfigToJson(c).contains("routing"));
  Json no_kv_heads = Base();
  no_kv_heads.erase("num_key_value_heads");
  EXPECT_EQ(Parse(no_kv_heads).num_kv_heads, 4);
}

TEST(Config, OldAndNewRopeKeys) {
  EXPECT_EQ(Parse(With("rope_theta", 5e5)).rope_theta, 5e5);
  EXPECT_EQ(
      Parse(With("rope_parameters", {{"rope_theta", 5e5}, {"rope_type", "default"}})).rope_theta,
      5e5);
  Json old = With("rope_theta", 5e5);
  old["rope_scaling"] = nullptr;
  old["torch_dtype"] = "float32";
  EXPECT_EQ(Parse(old).rope_theta, 5e5);
  EXPECT_THROW(Parse(With("rope_scaling", {{"rope_type", "longrope"}, {"factor", 2.0}})), Error);
  EXPECT_THROW(Parse(With("rope_scaling", {{"rope_type", "linear"}})), Error);
  const ModelConfig linear = Parse(With("rope_scaling", {{"type", "linear"}, {"factor", 2.0}}));
  EXPECT_EQ(linear.rope_scaling.factor, 2.0);
  EXPECT_EQ(ConfigToJson(Parse(ConfigToJson(linear))), ConfigToJson(linear));
  EXPECT_THROW(Parse(With("rope_parameters", {{"rope_theta", 1e4}, {"factor", 2.0}})), Error);
}

TEST(Config, DtrnetLayersNamesTheDenseOnes) {
  const ModelConfig c = Parse(With("dtrnet_layers", {0, 2}));
  EXPECT_EQ(MethodName(c), "dtrnet");
  EXPECT_EQ(RoutedLayers(c), (Layers{1, 3}));
  EXPECT_EQ(RoutedLayers(Parse(With("dtrnet_layers", Json::array()))), (Layers{0, 1, 2, 3}));
}

TEST(Config, Layouts) {
  EXPECT_EQ(RoutedLayers(Parse(With("routing", {{"method", "dtrnet"}}))), (Layers{1, 3}));
  EXPECT_EQ(RoutedLayers(Parse(With("routing", {{"method", "dtrnet"}, {"layout", "all"}}))),
            (Layers{0, 1, 2, 3}));
  EXPECT_TRUE(Parse(With("routing", {{"method", "dense"}})).routing.empty());
}

TEST(Config, DenseTwinHasNoRouting) {
  const ModelConfig twin = DenseTwin(Parse(With("routing", {{"method", "dtrnet"}})));
  EXPECT_TRUE(twin.routing.empty());
  EXPECT_EQ(ConfigToJson(twin), ConfigToJson(Parse(Base())));
}

TEST(Config, ErrorsNameTheKey) {
  const std::vector<std::pair<const char*, Json>> bad = {
      {"hidden_sizes", 64},
      {"vocab_size", 0},
      {"vocab_size", "100"},
      {"rope_interleaved", true},
      {"vocab_size", 1.5},
      {"hidden_size", -1},
      {"hidden_size", 66},
      {"intermediate_size", 0},
      {"num_hidden_layers", 0},
      {"num_attention_heads", 0},
      {"num_key_value_heads", 3},
      {"num_key_value_heads", 8},
      {"head_dim", 15},
      {"head_dim", 0},
      {"max_position_embeddings", 0},
      {"rms_norm_eps", -1.0},
      {"rope_theta", 0.0},
      {"hidden_act", "gelu"},
      {"model_type", "bert"},
      {"sliding_window", 20},
      {"attention_bias", 1},
      {"mlp_bias", "yes"},
      {"tie_word_embeddings", 1},
      {"dtrnet_layers", 3},
      {"dtrnet_layers", {-1}},
  };
  for (const auto& [key, value] : bad) {
    try {
      Parse(With(key, value));
      ADD_FAILURE() << key << " = " << value.dump() << " was taken";
    } catch (const Error& e) {
      const std::string message = e.what();
      EXPECT_NE(message.find(key), std::string::npos) << message;
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    }
  }
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"}) {
    Json json = Base();
    json.erase(key);
    EXPECT_THROW(Parse(json), Error) << key;
  }
  EXPECT_THROW(Parse(Json::array()), Error);
}

TEST(Config, RoutingErrors) {
  const std::vector<Json> bad = {
      {{"method", "mixture"}},
      {{"method", "dtrnet"}, {"layers", {4}}},
      {{"method", "dtrnet"}, {"layers", {3, 1}}},
      {{"method", "dtrnet"}, {"layers", {1, 1}}},
      {{"method", "dtrnet"}, {"layout", "quadlayer"}},
      {{"method", "dtrnet"}, {"aux_loss_coeff", -1.0}},
      {{"method", "dtrnet"}, {"fallback_share", 1.5}},
      {{"method", "dtrnet"}, {"capacity", 0.1}},
      {{"method", "dtrnet"}, {"bypass", "window"}, {"window", 0}},
      {{"method", "dtrnet"}, {"bypass", "window"}, {"kv", "all"}},
      {{"method", "dtrnet"}, {"bypass", "window"}, {"key_gradient", true}},
      {{"method", "dtrnet"}, {"soft_keys", true}},
      {{"method", "dllm"}, {"bypass", "window"}},
      {{"method", "dllm"}, {"estimator", "soft"}, {"soft_keys", true}},
      {{"method", "blocks"}, {"block_size", 24}},
      {{"method", "blocks"}, {"top_k", 0}},
      {{"method", "blocks"}, {"decider", "every_nth"}},
      {{"method", "dense"}, {"layers", {1}}},
      {{"method", "dense"}, {"layout", "bilayer"}},
      {{"method", "dense"}, {"aux_loss_coeff", 1e-3}},
      {{"method", "dtrnet"}, {"layers", {1}}, {"layout", "bilayer"}},
      {{"layers", {1}}},
      {{"method", "recursion"}},  // two middle layers, three recursions
      {{"method", "recursion"}, {"recursions", 1}},
      {{"method", "recursion"}, {"recursions", 2}, {"layers", {0, 2}}},
      {{"method", "recursion"}, {"recursions", 2}, {"layers", {1, 2, 3}}},
      {{"method", "recursion"}, {"recursions", 2}, {"layers", Json::array()}},
      {{"method", "recursion"}, {"recursions", 2}, {"choice", "depth"}},
      {{"method", "recursion"}, {"recursions", 2}, {"capacity", 0.5}},
      {{"method", "recursion"}, {"recursions", 2}, {"causal", "predictor"}},
      {{{"method", "recursion"}, {"recursions", 2}}, {{"method", "mod"}, {"layers", {2}}}},
      {{{"method", "recursion"}, {"recursions", 2}}, {{"method", "moe"}, {"layers", {1}}}},
      {{{"method", "recursion"}, {"recursions", 2}}, {{"method", "moe"}, {"layers", {2}}}},
  };
  for (const Json& routing : bad) EXPECT_THROW(Parse(With("routing", routing)), Error) << routing;
  Json both = With("routing", {{"method", "dtrnet"}});
  both["dtrnet_layers"] = {0, 2};
  EXPECT_THROW(Parse(both), Error);
}

TEST(Config, EveryFaultOfARoutingObjectIsNamed) {
  try {
    Parse(With("routing", {{"method", "dtrnet"},
                           {"layout", "spiral"},
                           {"estimator", "guess"},
                           {"temperature", -1},
                           {"reserved", 1.5},
                           {"gap", 3}}));
    FAIL();
  } catch (const Error& error) {
    for (const char* word : {"spiral", "prob_gate, ste, gumbel_ste, soft", "0.001 to 1000",
                             "reserved: expected an integer", "gap: unknown key"}) {
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << word << error.what();
    }
  }
}

TEST(Config, RecursionSharesWeights) {
  const ModelConfig middle = Parse(With("routing", {{"method", "recursion"}, {"recursions", 2}}));
  EXPECT_EQ(RoutedLayers(middle), (Layers{1, 2}));
  const ModelConfig pairs = Parse(
      With("routing", {{"method", "recursion"}, {"recursions", 2}, {"layers", {0, 1, 2, 3}}}));
  const Layers of_middle = {0, 1, 1, 3}, of_pairs = {0, 1, 0, 1};
  for (int32_t l = 0; l < 4; ++l) {
    EXPECT_EQ(WeightsLayer(middle, l), of_middle[l]);
    EXPECT_EQ(WeightsLayer(pairs, l), of_pairs[l]);
    EXPECT_EQ(WeightsLayer(DenseTwin(pairs), l), l);
  }
  try {
    Parse(With("routing", {{"method", "recursion"}, {"recursions", 2}, {"layers", {0, 1, 3}}}));
    FAIL();
  } catch (const Error& error) {
    for (const char* fault : {"consecutive ones, got 3 from 0 to 3", "a multiple of the 2"}) {
      EXPECT_NE(std::string(error.what()).find(fault), std::string::npos) << error.what();
    }
  }
  // Experts are welcome where no weights are shared.
  Parse(With("routing", {{{"method", "recursion"}, {"recursions", 2}},
                         {{"method", "moe"}, {"layers", {0, 3}}}}));
}

TEST(Config, Families) {
  Json mistral = With("model_type", "mistral");
  mistral["sliding_window"] = 64;
  mistral["max_position_embeddings"] = 512;
  const ModelConfig slides = Parse(mistral);
  EXPECT_EQ(SlidingWindow(slides, 3), 64);
  EXPECT_EQ(ConfigToJson(Parse(ConfigToJson(slides))), ConfigToJson(slides));
  mistral["routing"] = {{"method", "dtrnet"}};
  EXPECT_THROW(Parse(mistral), Error);

  Json qwen = With("model_type", "qwen2_moe");
  qwen["num_experts"] = 6;
  qwen["moe_intermediate_size"] = 24;
  qwen["shared_expert_intermediate_size"] = 40;
  qwen["decoder_sparse_step"] = 2;
  const ModelConfig moe = Parse(qwen);
  EXPECT_EQ(RoutedLayers(moe), (Layers{1, 3}));
  EXPECT_EQ(MlpShapeOf(moe, 1).expert_size, 24);
  EXPECT_EQ(MlpShapeOf(moe, 1).size, 40);
  EXPECT_EQ(MlpShapeOf(moe, 0).num_experts, 0);
  EXPECT_EQ(FileName(moe, "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
            "model.layers.1.mlp.experts.2.gate_proj.weight");
  EXPECT_EQ(FileName(moe, "model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.shared_expert.up_proj.weight");
  EXPECT_EQ(FileName(moe, "model.layers.0.mlp.up_proj.weight"),
            "model.layers.0.mlp.up_proj.weight");
  EXPECT_EQ(ConfigToJson(Parse(ConfigToJson(moe))), ConfigToJson(moe));
  EXPECT_FALSE(ConfigToJson(moe).contains("routing"));
  EXPECT_EQ(ConfigToJson(DenseTwin(moe)).at("model_type"), "qwen2");
  EXPECT_FALSE(ConfigToJson(DenseTwin(moe)).contains("num_experts"));
}

TEST(Config, TwoMethods) {
  const Json two = {{{"method", "dtrnet"}, {"layers", {1}}},
                    {{"method", "dtrnet"}, {"layers", {2}}}};
  const ModelConfig c = Parse(With("routing", two));
  EXPECT_EQ(RoutedLayers(c), (Layers{1, 2}));
  EXPECT_EQ(MethodName(c), "dtrnet+dtrnet");
  EXPECT_EQ(ConfigToJson(Parse(ConfigToJson(c))), ConfigToJson(c));
  EXPECT_THROW(Parse(With("routing", {{{"method", "dtrnet"}, {"layers", {1, 2}}},
                                      {{"method", "dtrnet"}, {"layers", {2}}}})),
               Error);
}

}  // namespace
}  // namespace detour::model
