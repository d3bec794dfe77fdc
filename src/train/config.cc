#include "train/config.h"

#include <algorithm>

#include "core/error.h"
#include "routing/registry.h"
#include "train/schedule.h"

namespace detour::train {

Json TrainConfigToJson(const TrainConfig& c) {
  return {{"data_dir", c.data_dir},
          {"model_config", c.model_config},
          {"init_from", c.init_from},
          {"method", c.method},
          {"layout", c.layout},
          {"routing", c.routing},
          {"aux_loss_coeff", c.aux_loss_coeff},
          {"seq_len", c.seq_len},
          {"micro_batch_size", c.micro_batch_size},
          {"global_batch_size", c.global_batch_size},
          {"max_steps", c.max_steps},
          {"max_tokens", c.max_tokens},
          {"max_time", c.max_time_s},
          {"lr", c.lr},
          {"min_lr", c.min_lr},
          {"warmup_steps", c.warmup_steps},
          {"lr_schedule", c.lr_schedule},
          {"decay_ratio", c.decay_ratio},
          {"beta1", c.beta1},
          {"beta2", c.beta2},
          {"adam_eps", c.adam_eps},
          {"weight_decay", c.weight_decay},
          {"grad_clip", c.grad_clip},
          {"schedules", c.schedules},
          {"target_share", c.target_share},
          {"share_ramp", c.share_ramp},
          {"controller_rate", c.controller_rate},
          {"document_attention", c.document_attention},
          {"activation_checkpointing", c.activation_checkpointing},
          {"seed", c.seed},
          {"eval_every", c.eval_every},
          {"eval_tokens", c.eval_tokens},
          {"save_every", c.save_every},
          {"keep_last", c.keep_last},
          {"log_every", c.log_every}};
}

namespace {

/// "key=value" or "method.key=value" into the object of that method (without one: of every method
/// that has the option). The value is JSON, or else a string.
void SetRoutingOption(const std::string& setting, Json* objects) {
  const size_t equals = setting.find('=');
  if (equals == std::string::npos || equals == 0) {
    Fail("train.config", "--routing: expected KEY=VALUE or METHOD.KEY=VALUE, got \"{}\"",
         Printable(setting));
  }
  std::string key = setting.substr(0, equals), method;
  const std::string text = setting.substr(equals + 1);
  if (const size_t dot = key.find('.'); dot != std::string::npos) {
    method = key.substr(0, dot);
    key = key.substr(dot + 1);
  }
  Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) value = text;
  bool found = false;
  for (Json& object : *objects) {
    const std::string name = object.at("method").get<std::string>();
    const auto options = routing::FindMethod(name).options();
    const bool has = std::any_of(options.begin(), options.end(),
                                 [&](const routing::Option& o) { return o.key == key; });
    if (method.empty() ? !has && objects->size() > 1 : name != method) continue;
    object[key] = value;
    found = true;
  }
  if (!found) {
    Fail("train.config", "--routing {}: no method of this model has that option",
         Printable(setting));
  }
}

/// The methods named "a+b", with what the model config says of them.
Json MethodObjects(const std::string& names, const model::ModelConfig& config) {
  Json objects = Json::array();
  for (size_t begin = 0; begin <= names.size();) {
    const size_t end = std::min(names.find('+', begin), names.size());
    Json object = {{"method", names.substr(begin, end - begin)}};
    for (const routing::RoutingConfig& r : config.routing) {
      if (object.at("method") == r.method) object = routing::RoutingToJson(r);
    }
    if (names != "dense") {
      routing::FindMethod(object.at("method"));
      objects.push_back(std::move(object));
    }
    begin = end + 1;
  }
  return objects;
}

}  // namespace

model::ModelConfig ResolveModelConfig(const TrainConfig& c) {
  const std::string& source = c.init_from.empty() ? c.model_config : c.init_from;
  if (source.empty()) Fail("train.config", "no model: give --model-config FILE or --init-from DIR");
  model::ModelConfig config = model::LoadConfig(source);
  const std::string method = c.method.empty() ? MethodName(config) : c.method;
  if (!c.init_from.empty() &&
      (method != MethodName(config) || !c.layout.empty() || !c.routing.empty())) {
    Fail("train.config", "--method, --layout and --routing describe a new model; {} has its own",
         c.init_from);
  }
  if (method == "dense") {
    for (const auto& [flag, given] : {std::pair{"--layout", !c.layout.empty()},
                                      {"--aux-loss-coeff", c.aux_loss_coeff > 0},
                                      {"--target-share", c.target_share > 0},
                                      {"--routing", !c.routing.empty()}}) {
      if (given) Fail("train.config", "{} needs a method with routers, got --method dense", flag);
    }
  }
  Json objects = MethodObjects(method, config);
  for (Json& object : objects) {
    if (!c.layout.empty()) {
      object.erase("layers");
      object["layout"] = c.layout;
    }
    if (c.aux_loss_coeff >= 0) object["aux_loss_coeff"] = c.aux_loss_coeff;
  }
  for (const std::string& setting : c.routing) SetRoutingOption(setting, &objects);
  config.routing.clear();
  for (const Json& object : objects) {
    config.routing.push_back(routing::ParseRouting(
        object, "method " + object.at("method").get<std::string>(), config.num_layers));
  }
  CheckRouting(config, source);
  ParseSchedules(c.schedules);
  return config;
}

model::Model InitialModel(const TrainConfig& c) {
  const model::ModelConfig config = ResolveModelConfig(c);
  if (!c.init_from.empty()) {
    model::Model m = model::LoadModel(c.init_from);
    m.config = config;
    return m;
  }
  model::Model m = model::AllocateModel(config);
  model::InitializeWeights(m, c.seed);
  return m;
}

int64_t TotalSteps(const TrainConfig& c) {
  const int64_t per_step = c.global_batch_size * c.seq_len;
  if (c.max_steps > 0) return c.max_steps;
  if (c.max_tokens > 0) return (c.max_tokens + per_step - 1) / per_step;
  Fail("train.config", "no end: give --max-steps or --max-tokens");
}

}  // namespace detour::train
