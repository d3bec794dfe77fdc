// What a training run is told. One field per flag of `detour train`; the flag's help text is the
// documentation.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/json.h"
#include "model/model.h"

namespace detour::train {

struct TrainConfig {
  std::string data_dir, out_dir, model_config, init_from, tokenizer_dir, resume;
  std::string method, layout;        ///< override the model config's routing if set
  std::vector<std::string> routing;  ///< KEY=VALUE or METHOD.KEY=VALUE, options of the methods
  double aux_loss_coeff = -1;        ///< < 0: the model config's

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

  bool document_attention = true;
  bool activation_checkpointing = false;
  uint64_t seed = 42;
  int64_t eval_every = 250, eval_tokens = 131072, save_every = 500, keep_last = 2, log_every = 10;
  std::string tensorboard;
};

/// One line per key of the config, defaults resolved: printed, stored in checkpoints, compared on
/// resume.
Json TrainConfigToJson(const TrainConfig& config);

/// The model a run starts from: the model config with the flags' method, layout and λ, or the
/// weights of init_from.
model::ModelConfig ResolveModelConfig(const TrainConfig& config);
model::Model InitialModel(const TrainConfig& config);
/// Steps of the run: max_steps, or as many as max_tokens needs. Error if neither is set.
int64_t TotalSteps(const TrainConfig& config);

}  // namespace detour::train
