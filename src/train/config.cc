#include "train/config.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "model/cost.h"
#include "routing/registry.h"
#include "train/schedule.h"

namespace detour::train {

Json TrainConfigToJson(const TrainConfig& c) {
  Json json = {{"data_dir", c.data_dir},
               {"model_config", c.model_config},
               {"init_from", c.init_from},
               {"method", c.method},
               {"layout", c.layout},
               {"routing", c.routing},
               {"aux_loss_coeff", c.aux_loss_coeff},
               {"train", c.train},
               {"lora_rank", c.lora.rank},
               {"lora_alpha", c.lora.alpha},
               {"lora_targets", c.lora.targets},
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
               {"controller_integral", c.controller_integral},
               {"document_attention", c.document_attention},
               {"activation_checkpointing", c.activation_checkpointing},
               {"seed", c.seed},
               {"eval_every", c.eval_every},
               {"eval_tokens", c.eval_tokens},
               {"save_every", c.save_every},
               {"keep_last", c.keep_last},
               {"log_every", c.log_every}};
  // Runs without a teacher keep the text, and so the hash, that they had before there were any.
  if (!c.distill.teacher.empty()) {
    json["teacher"] = c.distill.teacher;
    json["distill_weight"] = c.distill.weight;
    json["distill_temperature"] = c.distill.temperature;
    json["distill_hidden"] = c.distill.hidden;
    json["stop_within"] = c.stop_within;
  }
  return json;
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

/// Whether a router of the model has weights that a gradient reaches: those of its decisions, or,
/// whoever decides, of its bypass.
bool RoutersLearn(const model::ModelConfig& config) {
  const auto learns = [](const routing::RoutingConfig& r) {
    return r.Learned() || r.TextOr("bypass", "") == "constant" ||
           (r.options.contains("value_scale") && r.Flag("value_scale"));
  };
  return RouterParameterCount(config) > 0 &&
         std::any_of(config.routing.begin(), config.routing.end(), learns);
}

}  // namespace

void CheckTrained(const TrainConfig& c, const model::ModelConfig& model) {
  std::vector<std::string> faults;
  const auto fault = [&]<typename... Args>(fmt::format_string<Args...> format, Args&&... args) {
    faults.push_back(fmt::format(format, std::forward<Args>(args)...));
  };
  if (std::find(std::begin(kTrainChoices), std::end(kTrainChoices), c.train) ==
      std::end(kTrainChoices)) {
    fault("--train: expected one of {}, got \"{}\"", fmt::join(kTrainChoices, ", "),
          Printable(c.train));
  } else if (c.TrainsRouters() && model.routing.empty()) {
    fault("--train {} needs a method with routers, got method dense", c.train);
  } else if (c.TrainsRouters() && !RoutersLearn(model)) {
    fault("--train {}: no router of method {} has weights to train", c.train, MethodName(model));
  }
  if (c.lora.rank < 1 || c.lora.rank > model.hidden_size) {
    fault("--lora-rank: expected 1 to {}, the model's width, got {}", model.hidden_size,
          c.lora.rank);
  }
  if (!(c.lora.alpha > 0) || !std::isfinite(c.lora.alpha)) {
    fault("--lora-alpha: expected a positive number, got {}", c.lora.alpha);
  }
  if (ParseLoraTargets(c.lora.targets).empty()) {
    fault(
        "--lora-targets: expected some of q, k, v, o, gate, up, down, joined by commas, got "
        "\"{}\"",
        Printable(c.lora.targets));
  }
  const DistillOptions no_teacher;
  if (c.distill.teacher.empty() && (c.distill != no_teacher || c.stop_within > 0)) {
    fault(
        "--distill-weight, --distill-temperature, --distill-hidden and --stop-within need "
        "--teacher");
  }
  if (c.stop_within > 0 && c.stop_within < 1) {
    fault("--stop-within: expected 0 or at least 1, got {}", c.stop_within);
  }
  const LoraOptions unset;
  for (const auto& [flag, given] : {std::pair{"--lora-rank", c.lora.rank != unset.rank},
                                    {"--lora-alpha", c.lora.alpha != unset.alpha},
                                    {"--lora-targets", c.lora.targets != unset.targets}}) {
    if (given && faults.empty() && !c.TrainsLora()) {
      fault("{} needs --train lora or router+lora, got --train {}", flag, c.train);
    }
  }
  if (!faults.empty()) Fail("train.config", "{}", fmt::join(faults, "; "));
}

bool HasNewRouters(const TrainConfig& c, const model::ModelConfig& model) {
  return !model.routing.empty() &&
         (c.init_from.empty() || model::LoadConfig(c.init_from).routing.empty());
}

model::ModelConfig ResolveModelConfig(const TrainConfig& c) {
  const std::string& source = c.init_from.empty() ? c.model_config : c.init_from;
  if (source.empty()) Fail("train.config", "no model: give --model-config FILE or --init-from DIR");
  model::ModelConfig config = model::LoadConfig(source);
  const std::string method = c.method.empty() ? MethodName(config) : c.method;
  const bool adds_routers = config.routing.empty() && method != "dense";
  if (!c.init_from.empty() && !adds_routers &&
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
  CheckTrained(c, config);
  ParseSchedules(c.schedules);
  return config;
}

int64_t TotalSteps(const TrainConfig& c) {
  const int64_t per_step = c.global_batch_size * c.seq_len;
  if (c.max_steps > 0) return c.max_steps;
  if (c.max_tokens > 0) return (c.max_tokens + per_step - 1) / per_step;
  Fail("train.config", "no end: give --max-steps or --max-tokens");
}

}  // namespace detour::train
