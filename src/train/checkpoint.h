// Training checkpoints: a Hugging Face directory plus what a run needs to go on as if it had never
// stopped.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/json.h"
#include "model/model.h"
#include "train/lora.h"
#include "train/optimizer.h"

namespace detour::train {

/// Everything of a run that is not a tensor. Random numbers need no state: they are functions of
/// (seed, step, row).
struct TrainerState {
  int64_t step = 0;           ///< steps done
  int64_t tokens = 0;         ///< tokens seen
  int64_t next_sequence = 0;  ///< data position: global index of the next sequence
  uint64_t seed = 0;
  double seconds = 0;          ///< training time so far
  std::vector<double> duals;   ///< dual variable of each method's constraint
  std::vector<double> drifts;  ///< of each router: what the ratio controller adds in every step
  Json config;                 ///< the resolved training config
};

/// Writes OUT/step-NNNNNNNN (config.json, model.safetensors, tokenizer files of `tokenizer_dir` if
/// set, optimizer.safetensors, lora.safetensors if there are adapters, trainer_state.json)
/// atomically, points OUT/latest at it, then removes all but the newest `keep_last`. Returns its
/// path.
std::string SaveCheckpoint(const std::string& out_dir, model::Model& model, AdamW& optimizer,
                           Lora* lora, const TrainerState& state,
                           const std::vector<std::string>& tokenizer_files, int64_t keep_last);

/// OUT/latest, or "" if there is none. Leftovers of a killed run are cleaned up first.
std::string LatestCheckpoint(const std::string& out_dir);

/// What the checkpoint `dir` says of its run.
TrainerState LoadTrainerState(const std::string& dir);
/// Reads its optimizer and, if there are any, its adapters (the weights have been read by
/// model::LoadModel). Error("train.checkpoint") if a tensor is missing or has another shape.
void LoadTrained(const std::string& dir, AdamW& optimizer, Lora* lora);

}  // namespace detour::train
