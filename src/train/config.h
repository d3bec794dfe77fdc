// What a training run is told. One field per flag of `detour train`; the flag's help text is the
// documentation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/json.h"
#include "model/model.h"
#include "train/distill.h"
#include "train/lora.h"

namespace detour::train {

inline constexpr const char* kTrainChoices[] = {"all", "router", "router+lora", "lora"};

struct TrainConfig {
  std::string data_dir, out_dir, model_config, init_from, tokenizer_dir, resume;
  std::string method, layout;        ///< override the model config's routing if set
  std::vector<std::string> routing;  ///< KEY=VALUE or METHOD.KEY=VALUE, options of the methods
  double aux_loss_coeff = -1;        ///< < 0: the model config's

  std::string train = "all";  ///< what is trained: one of kTrainChoices; the rest is frozen
  LoraOptions lora;           ///< for lora and router+lora
  DistillOptions distill;
  /// Stop once the target share is reached and the perplexity of validation is at most this times
  /// the teacher's; 0: run to the end.
  double stop_within = 0;

  int64_t seq_len = 1024;
  int64_t micro_batch_size = 8, global_batch_size = 8;  ///< sequences
  int64_t max_steps = 0, max_tokens = 0;
  double max_time_s = 0;

  double lr = 1e-3, min_lr = 1e-4;
  int64_t warmup_steps = 100;
  std::string lr_schedule = "cosine";
  double decay_ratio = 0.2;  ///< of the steps, for wsd
  double beta1 = 0.9, beta2 = 0.95, adam_eps = 1e-8, weight_decay = 0.1, grad_clip = 1.0;

  std::vector<std::string> schedules;  ///< "KNOB: FROM->TO SHAPE [BEGIN..END]" (schedule.h)
  double target_share = 0;             ///< ratio controller; 0: off
  double share_ramp = 0.3;             ///< of the steps, from "all attend" down to the target
  double controller_rate = 0.1;
  double controller_integral = 0;  ///< of each move that is repeated in all later steps

  bool document_attention = true;
  bool activation_checkpointing = false;
  uint64_t seed = 42;
  int64_t eval_every = 250, eval_tokens = 131072, save_every = 500, keep_last = 2, log_every = 10;
  std::string tensorboard;

  bool TrainsRouters() const { return train == "router" || train == "router+lora"; }
  bool TrainsLora() const { return train == "lora" || train == "router+lora"; }
};

/// One line per key of the config, defaults resolved: printed, stored in checkpoints, compared on
/// resume.
Json TrainConfigToJson(const TrainConfig& config);

/// The model a run starts from: the model config with the flags' method, layout and λ, or the
/// weights of init_from. Where those are a dense model's and the flags name a method, its routers
/// are new and all else is loaded; Error("train.config") if the two models differ in more.
model::ModelConfig ResolveModelConfig(const TrainConfig& config);
model::Model InitialModel(const TrainConfig& config);
/// What is trained, against the model: Error("train.config") that lists every fault. Part of
/// ResolveModelConfig.
void CheckTrained(const TrainConfig& config, const model::ModelConfig& model);
/// Whether InitialModel draws the routers, rather than loading them.
bool HasNewRouters(const TrainConfig& config, const model::ModelConfig& model);
/// Steps of the run: max_steps, or as many as max_tokens needs. Error if neither is set.
int64_t TotalSteps(const TrainConfig& config);

}  // namespace detour::train
