// A training run from start (or resume) to end.
#pragma once

#include <functional>
#include <string>

#include "train/checkpoint.h"
#include "train/config.h"

namespace detour::train {

struct TrainSummary {
  int64_t steps = 0, tokens = 0;
  double seconds = 0;  ///< training time, validation and saving left out
  double loss = 0;     ///< of the last step
  double val_loss = 0, val_bits_per_byte = 0, val_share = 0;
  double tokens_per_s = 0;
  /// Forward FLOPs per token as executed: in training with both ways of a gate where its estimator
  /// needs them and the pass that decides for several micro-batches; when serving, in validation.
  double train_flops_per_token = 0, serving_flops_per_token = 0;
  int64_t peak_rss_bytes = 0;
  std::string checkpoint;  ///< the last one written
  std::string stopped_by;  ///< "done", "recovered", "max-time", "signal"
};

/// Trains, validates, logs and saves as the config says. `stop_requested` is asked after every
/// step: true saves and returns. On divergence the last good checkpoint stays `latest` and
/// Error("train.diverged") names it.
TrainSummary RunTraining(const TrainConfig& config, const std::function<bool()>& stop_requested);

}  // namespace detour::train
