#include "train/loop.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <optional>

#include "core/error.h"
#include "core/op_counter.h"
#include "data/tokenizer.h"
#include "eval/perplexity.h"
#include "io/atomic.h"
#include "model/cost.h"
#include "report/memory.h"
#include "report/metrics.h"
#include "report/status.h"
#include "report/table.h"
#include "routing/registry.h"
#include "train/schedule.h"
#include "train/step.h"

namespace detour::train {

namespace fs = std::filesystem;

namespace {

/// Training text on which the ratio controller makes its last move: a tenth of the run's, within
/// these bounds. Shares of documents differ: more of them give a truer mean.
constexpr int64_t kMinSettleTokens = 32768, kMaxSettleTokens = 131072;

/// The state and the outputs of one run.
class Run {
 public:
  Run(const TrainConfig& config, const std::function<bool()>& stop_requested)
      : config_(config),
        stop_requested_(stop_requested),
        train_(data::TokenShards::Open(config.data_dir, data::Split::kTrain)),
        val_(data::TokenShards::Open(config.data_dir, data::Split::kVal)),
        schedules_(ParseSchedules(config.schedules)),
        sampler_(train_.num_tokens(), config.seq_len, config.seed),
        total_steps_(TotalSteps(config)),
        eta_(static_cast<double>(total_steps_)) {}

  TrainSummary Train();

 private:
  void Prepare();
  void Resume(const std::string& checkpoint);
  void CheckSameTrained(const std::string& checkpoint) const;
  void ForEachTrained(const routing::TensorVisitor& visit);
  void PrintTrained(bool is_new);
  Lora* lora() { return lora_ ? &*lora_ : nullptr; }
  std::vector<eval::Batch> NextBatches(int64_t num_sequences) const;
  double TargetShareAt(int64_t step) const {
    return TargetShare(config_, schedules_, step, total_steps_);
  }
  routing::Knobs KnobsAt(int64_t step) const;
  std::vector<double> WeightsAt(int64_t step) const;
  std::vector<double> ExitWeightsAt(int64_t step) const;
  void UpdateDuals(const BatchStatistics& statistics);
  void CountTokens();
  void Log(const StepResult& step, double lr, double target_share, double seconds);
  eval::EvalResult Evaluate(const model::Model& model) const;
  void Validate();
  bool Recovered() const;
  void Settle();
  void Save();
  std::vector<std::string> FindTokenizerFiles() const;

  const TrainConfig& config_;
  const std::function<bool()>& stop_requested_;
  const data::TokenShards train_, val_;
  const Schedules schedules_;
  const data::BatchSampler sampler_;
  const int64_t total_steps_;
  model::Model model_;
  std::optional<Lora> lora_;
  std::unique_ptr<Teacher> teacher_;
  std::optional<double> teacher_loss_;  // on validation text, from the first validation on
  std::unique_ptr<AdamW> optimizer_;
  TrainerState state_;
  TrainSummary summary_;
  std::optional<report::MetricsLog> metrics_;
  std::optional<report::TensorBoardWriter> tensorboard_;
  report::StatusLine status_;
  report::Eta eta_;
  int64_t saved_step_ = -1;
  std::vector<std::string> tokenizer_files_;  // copied into each checkpoint
};

void Run::Prepare() {
  if (config_.global_batch_size % config_.micro_batch_size != 0) {
    Fail("train.config", "--global-batch-size {} is no multiple of --micro-batch-size {}",
         config_.global_batch_size, config_.micro_batch_size);
  }
  std::error_code error;
  fs::create_directories(config_.out_dir, error);
  if (!fs::is_directory(config_.out_dir)) {
    Fail("train.out_dir", "{}: expected a folder that can be made, got: {}", config_.out_dir,
         error ? error.message() : "a file");
  }
  tokenizer_files_ = FindTokenizerFiles();
  if (tokenizer_files_.empty()) {
    status_.Print("note: no tokenizer beside the data and no --tokenizer: checkpoints hold none");
  }
  std::string resume;
  if (config_.resume == "auto") {
    resume = LatestCheckpoint(config_.out_dir);
  } else if (!config_.resume.empty()) {
    resume = config_.resume;
  } else if (!LatestCheckpoint(config_.out_dir).empty()) {
    Fail("train.out_dir",
         "{} already holds checkpoints. Hint: --resume auto goes on with them; or choose another "
         "--out-dir",
         config_.out_dir);
  }
  model_ = resume.empty() ? InitialModel(config_) : model::LoadModel(resume);
  if (!resume.empty()) CheckTrained(config_, model_.config);
  if (TargetShareAt(total_steps_) > 0 && !HasShiftableRouter(model_)) {
    Fail("train.config", "--target-share: no router of method {} has a bias that could be moved",
         MethodName(model_.config));
  }
  for (const routing::RoutingConfig& r : model_.config.routing) {
    state_.duals.push_back(r.NumberOr("aux_loss_coeff", 0));
  }
  state_.drifts.assign(model::Routers(model_.config).size(), 0);
  // Real models often have more rows than their tokenizer has tokens.
  if (model_.config.vocab_size < train_.vocab_size()) {
    Fail("train.config", "the model has a vocabulary of {}, the data {} were made with one of {}",
         model_.config.vocab_size, config_.data_dir, train_.vocab_size());
  }
  if (!config_.init_from.empty() && data::HasTokenizer(config_.init_from)) {
    const auto tokenizer = data::Tokenizer::Load(config_.init_from);
    data::CheckMadeWith(train_, *tokenizer, config_.init_from);
  }
  if (config_.seq_len > model_.config.max_position_embeddings) {
    Fail("train.config", "--seq-len {} is beyond the model's max_position_embeddings {}",
         config_.seq_len, model_.config.max_position_embeddings);
  }
  if (resume.empty() && HasNewRouters(config_, model_.config)) CountTokens();
  if (!config_.distill.teacher.empty()) {
    teacher_ = std::make_unique<Teacher>(config_.distill, model_.config);
  }
  if (config_.TrainsLora()) lora_.emplace(model_, config_.lora, config_.seed);
  optimizer_ = std::make_unique<AdamW>(
      [this](const routing::TensorVisitor& visit) { ForEachTrained(visit); },
      AdamWOptions{config_.beta1, config_.beta2, config_.adam_eps, config_.weight_decay});
  state_.seed = config_.seed;
  if (!resume.empty()) Resume(resume);
  state_.config = TrainConfigToJson(config_);
  const int64_t resume_step = resume.empty() ? -1 : state_.step;
  metrics_ = report::MetricsLog::Open(config_.out_dir + "/metrics.jsonl", resume_step);
  if (!config_.tensorboard.empty()) tensorboard_.emplace(config_.tensorboard, resume_step);

  const int64_t routers = model::CountParameters(model_, /*routers_only=*/true);
  const int64_t all = model::CountParameters(model_);
  status_.Print(fmt::format(
      "{}: {} parameters ({} in routers, {:.2f} %), {} layers of which {} routed; {} steps of {} "
      "tokens; {} training tokens a pass",
      MethodName(model_.config), report::FormatCount(all), report::FormatCount(routers),
      100.0 * routers / all, model_.config.num_layers, RoutedLayers(model_.config).size(),
      total_steps_, report::FormatThousands(config_.global_batch_size * config_.seq_len),
      report::FormatCount(train_.num_tokens())));
  if (config_.train != "all") PrintTrained(resume.empty());
}

/// The weights that the run trains, by name.
void Run::ForEachTrained(const routing::TensorVisitor& visit) {
  if (config_.train == "all") ForEachTensor(model_, visit);
  for (size_t l = 0; config_.TrainsRouters() && l < model_.layers.size(); ++l) {
    ForEachRouterTensor(model_.layers[l], [&](const std::string& name, at::Tensor& t) {
      visit(fmt::format("model.layers.{}.{}", l, name), t);
    });
  }
  if (lora_) lora_->ForEachAdapter(visit);
}

void Run::PrintTrained(bool is_new) {
  const int64_t trained = optimizer_->CountParameters();
  const int64_t adapters = lora_ ? lora_->CountParameters() : 0;
  const std::string of_adapters =
      lora_ ? fmt::format(", {} in adapters (rank {}, alpha {}, on {})",
                          report::FormatCount(adapters), config_.lora.rank, config_.lora.alpha,
                          config_.lora.targets)
            : "";
  status_.Print(fmt::format("--train {}: {} parameters, {} in routers{}; the rest is frozen",
                            config_.train, report::FormatCount(trained),
                            report::FormatCount(trained - adapters), of_adapters));
  if (is_new && config_.init_from.empty()) {
    status_.Print("note: no --init-from: the frozen weights are random");
  }
}

/// A run goes on with what it trained: neither optimizer nor adapters would fit anything else.
void Run::CheckSameTrained(const std::string& checkpoint) const {
  const Json now = TrainConfigToJson(config_);
  std::vector<std::string> keys = {"train"};
  if (config_.TrainsLora()) keys.insert(keys.end(), {"lora_rank", "lora_alpha", "lora_targets"});
  std::vector<std::string> faults;
  for (const std::string& key : keys) {
    // Older checkpoints know "all" only.
    const Json was = state_.config.value(key, key == "train" ? Json("all") : Json());
    if (was != now.at(key)) {
      faults.push_back(fmt::format("{} was {}, is now {}", key, was.dump(), now.at(key).dump()));
    }
  }
  if (!faults.empty()) {
    Fail("train.config", "{}: {}. Hint: --init-from starts a new run from its weights", checkpoint,
         fmt::join(faults, "; "));
  }
}

void Run::Resume(const std::string& checkpoint) {
  state_ = LoadTrainerState(checkpoint);
  state_.duals.resize(model_.config.routing.size());
  state_.drifts.resize(model::Routers(model_.config).size());
  CheckSameTrained(checkpoint);
  LoadTrained(checkpoint, *optimizer_, lora());
  saved_step_ = state_.step;
  summary_.checkpoint = checkpoint;
  const Json now = TrainConfigToJson(config_);
  for (const auto& [key, value] : now.items()) {
    if (state_.config.contains(key) && state_.config.at(key) != value) {
      status_.Print(fmt::format("note: {} was {} when the checkpoint was written, is now {}", key,
                                state_.config.at(key).dump(), value.dump()));
    }
  }
  status_.Print(fmt::format("resuming {} at step {}", checkpoint, state_.step));
}

std::vector<eval::Batch> Run::NextBatches(int64_t num_sequences) const {
  std::vector<eval::Batch> batches;
  for (int64_t done = 0; done < num_sequences; done += config_.micro_batch_size) {
    std::vector<int64_t> firsts;
    for (int64_t i = 0; i < config_.micro_batch_size; ++i) {
      firsts.push_back(sampler_.Sequence(state_.next_sequence + done + i));
    }
    batches.push_back(eval::MakeBatch(train_, firsts, config_.seq_len, config_.document_attention));
    batches.back().first_row = done * config_.seq_len;
  }
  return batches;
}

routing::Knobs Run::KnobsAt(int64_t step) const {
  routing::Knobs knobs;
  knobs.temperature = ScheduledValue(schedules_, "temperature", -1, step, total_steps_);
  knobs.capacity = ScheduledValue(schedules_, "capacity", -1, step, total_steps_);
  knobs.routed_layers = static_cast<int32_t>(
      std::lround(ScheduledValue(schedules_, "routed_layers", -1, step, total_steps_)));
  return knobs;
}

/// Loss weight of each method: its dual variable, a schedule's value, or its option.
std::vector<double> Run::WeightsAt(int64_t step) const {
  std::vector<double> weights;
  const auto& methods = model_.config.routing;
  for (size_t i = 0; i < methods.size(); ++i) {
    const double own = methods[i].NumberOr("aux_loss_coeff", 0);
    const bool held = methods[i].NumberOr("dual_rate", 0) > 0;
    weights.push_back(held ? state_.duals.at(i)
                           : ScheduledValue(schedules_, "aux_loss_coeff", own, step, total_steps_));
  }
  return weights;
}

/// Loss weights of every layer's state, of a model that trains its exits.
std::vector<double> Run::ExitWeightsAt(int64_t step) const {
  for (const routing::RoutingConfig& r : model_.config.routing) {
    if (const auto weights = routing::FindMethod(r.method).exit_weights) {
      return weights(r, model_.config.num_layers, step, total_steps_);
    }
  }
  return {};
}

/// Projected ascent: a constraint's weight rises while its budget is exceeded.
void Run::UpdateDuals(const BatchStatistics& statistics) {
  const auto& methods = model_.config.routing;
  for (size_t i = 0; i < methods.size(); ++i) {
    const double rate = methods[i].NumberOr("dual_rate", 0);
    if (rate <= 0 || statistics.all_flops.at(i) == 0) continue;
    const double excess =
        statistics.taken_flops[i] / statistics.all_flops[i] - methods[i].Number("budget_target");
    state_.duals[i] = std::max(0.0, state_.duals[i] + rate * excess);
  }
}

/// Tells deciders that read a token's frequency how often the training text has it.
void Run::CountTokens() {
  const auto& methods = model_.config.routing;
  if (std::none_of(methods.begin(), methods.end(), [](const routing::RoutingConfig& r) {
        return r.TextOr("decider", "") == "frequency";
      })) {
    return;
  }
  std::vector<int64_t> counts(model_.config.vocab_size);
  std::vector<int32_t> tokens(1 << 16);
  for (int64_t begin = 0; begin < train_.num_tokens(); begin += std::ssize(tokens)) {
    tokens.resize(std::min<int64_t>(std::ssize(tokens), train_.num_tokens() - begin));
    train_.Read(begin, tokens);
    for (int32_t id : tokens) ++counts[id];
  }
  for (model::LayerWeights& layer : model_.layers) {
    for (const auto& router : layer.routers) {
      if (router) router->SetFrequencies(counts);
    }
  }
}

void Run::Log(const StepResult& step, double lr, double target_share, double seconds) {
  const double tokens = static_cast<double>(config_.global_batch_size * config_.seq_len);
  const std::vector<model::RouterId> routers = model::Routers(model_.config);
  std::vector<double> shares;  // of gates
  std::vector<std::vector<int64_t>> choices;
  for (size_t r = 0; r < routers.size(); ++r) {
    const RouterStatistics& s = step.statistics.routers[r];
    if (s.choices.empty()) {
      shares.push_back(step.statistics.Share(r));
    } else {
      choices.push_back(s.choices);
    }
  }
  double mean_share = 0;
  for (double s : shares) mean_share += s / shares.size();
  eta_.Update(static_cast<double>(state_.step));
  const std::string share_text =
      shares.empty() ? "" : fmt::format("  attend {:5.1f}%", 100 * mean_share);
  status_.Update(fmt::format(
      "step {}/{}  loss {:.4f}{}{}  grad {:.2f}  lr {:.2e}  {} tok/s  {}  ETA {}", state_.step,
      total_steps_, step.loss, teacher_ ? fmt::format("  KL {:.4f}", step.divergence) : "",
      share_text, step.grad_norm, lr, report::FormatCount(tokens / seconds),
      report::FormatBytes(report::CurrentRssBytes()),
      report::FormatDuration(eta_.RemainingSeconds())));
  if (state_.step % config_.log_every != 0 && state_.step != total_steps_) return;
  Json record = {{"loss", step.loss},
                 {"grad_norm", step.grad_norm},
                 {"lr", lr},
                 {"tokens", state_.tokens},
                 {"tokens_per_s", tokens / seconds},
                 {"rss_bytes", report::CurrentRssBytes()}};
  if (!shares.empty()) {
    record["share"] = mean_share;
    record["share_by_layer"] = shares;
    if (target_share > 0) record["target_share"] = target_share;
  }
  if (teacher_) record["divergence"] = step.divergence;
  if (!choices.empty()) record["expert_choices"] = choices;
  if (!routers.empty()) {
    record["aux_loss"] = step.aux_loss;
    record["aux_loss_coeff"] = WeightsAt(state_.step - 1);
  }
  metrics_->Write(state_.step, record);
  if (!tensorboard_) return;
  std::vector<std::pair<std::string, double>> scalars = {{"train/loss", step.loss},
                                                         {"train/grad_norm", step.grad_norm},
                                                         {"train/lr", lr},
                                                         {"train/tokens_per_s", tokens / seconds}};
  if (!shares.empty()) scalars.emplace_back("routing/share", mean_share);
  for (size_t r = 0; r < routers.size(); ++r) {
    if (!step.statistics.routers[r].choices.empty()) continue;
    scalars.emplace_back("routing/" + routers[r].name, step.statistics.Share(r));
  }
  tensorboard_->Scalars(state_.step, scalars);
}

/// Whether every method has a rule that serves; validation decides by the training rule if not.
bool ServesCausally(const model::ModelConfig& config) {
  return std::none_of(
      config.routing.begin(), config.routing.end(),
      [](const routing::RoutingConfig& r) { return r.TextOr("causal", "") == "none"; });
}

eval::EvalResult Run::Evaluate(const model::Model& model) const {
  return eval::Evaluate(model, val_,
                        {.seq_len = config_.seq_len,
                         .max_tokens = config_.eval_tokens,
                         .micro_batch_size = config_.micro_batch_size,
                         .document_attention = config_.document_attention,
                         .knobs = KnobsAt(state_.step),
                         .teacher_forced = !ServesCausally(model.config)});
}

void Run::Validate() {
  const eval::EvalResult result = Evaluate(model_);
  summary_.val_loss = result.loss;
  summary_.val_bits_per_byte = result.bits_per_byte;
  summary_.val_share = result.share_routed;
  summary_.serving_flops_per_token = result.flops_per_token;
  Json record = {{"val_loss", result.loss}, {"val_bits_per_byte", result.bits_per_byte}};
  std::string share_text, teacher_text;
  if (!model_.config.routing.empty()) {
    record["val_share"] = result.share_routed;
    share_text = fmt::format(", {:.1f}% attend in routed layers", 100 * result.share_routed);
  }
  if (teacher_) {
    if (!teacher_loss_) teacher_loss_ = Evaluate(teacher_->model()).loss;
    record["teacher_val_loss"] = *teacher_loss_;
    teacher_text =
        fmt::format(", perplexity {:.4f} x the teacher's", std::exp(result.loss - *teacher_loss_));
  }
  metrics_->Write(state_.step, record);
  status_.Print(fmt::format("step {}: validation loss {:.4f} ± {:.4f}, {:.4f} bits per byte{}{}",
                            state_.step, result.loss, result.loss_stderr, result.bits_per_byte,
                            teacher_text, share_text));
  if (tensorboard_) {
    tensorboard_->Scalar(state_.step, "val/loss", result.loss);
    tensorboard_->Scalar(state_.step, "val/bits_per_byte", result.bits_per_byte);
  }
}

/// Whether the last validation found what --stop-within asks for. Fewer tokens than the target may
/// attend: settling lets the others in.
bool Run::Recovered() const {
  if (config_.stop_within == 0) return false;
  const double target = TargetShareAt(total_steps_);
  const bool at_share = target == 0 || (TargetShareAt(state_.step) <= target + 1e-9 &&
                                        summary_.val_share <= target + 0.02);
  return at_share && summary_.val_loss - *teacher_loss_ <= std::log(config_.stop_within);
}

/// The ratio controller's last move.
void Run::Settle() {
  if (TargetShareAt(total_steps_) == 0) return;
  const int64_t text = std::clamp(state_.tokens / 10, kMinSettleTokens, kMaxSettleTokens);
  const int64_t sequences = (text + config_.seq_len - 1) / config_.seq_len;
  SettleShares(model_, NextBatches(sequences), TargetShareAt(total_steps_));
}

std::vector<std::string> Run::FindTokenizerFiles() const {
  if (config_.tokenizer_dir.empty()) return data::TokenizerFiles(config_.data_dir);
  data::Tokenizer::Load(config_.tokenizer_dir);  // an Error if it is none
  return data::TokenizerFiles(config_.tokenizer_dir);
}

void Run::Save() {
  if (saved_step_ == state_.step) return;
  metrics_->Sync();
  state_.seconds = summary_.seconds;
  summary_.checkpoint = SaveCheckpoint(config_.out_dir, model_, *optimizer_, lora(), state_,
                                       tokenizer_files_, config_.keep_last);
  saved_step_ = state_.step;
}

TrainSummary Run::Train() {
  Prepare();
  summary_.stopped_by = "done";
  if (state_.step >= total_steps_) {
    status_.Print(
        fmt::format("nothing left to do: {} has all {} steps", summary_.checkpoint, total_steps_));
    summary_.steps = state_.step;
    summary_.tokens = state_.tokens;
    return summary_;
  }
  summary_.seconds = state_.seconds;
  const double seconds_before = state_.seconds;
  int64_t tokens_now = 0, flops_now = 0;
  while (state_.step < total_steps_) {
    const double start = report::MonotonicSeconds();
    const double lr = LearningRate(config_, state_.step, total_steps_);
    const double target = TargetShareAt(state_.step);
    const int64_t flops_before = GlobalOpCounter().Total();
    StepResult step;
    try {
      step = TrainStep(model_, *optimizer_, NextBatches(config_.global_batch_size),
                       {.lr = lr,
                        .grad_clip = config_.grad_clip,
                        .knobs = KnobsAt(state_.step),
                        .budget_weights = WeightsAt(state_.step),
                        .target_share = target,
                        .controller_rate = ControllerRate(config_, state_.step, total_steps_),
                        .controller_integral = config_.controller_integral,
                        .drifts = config_.controller_integral > 0 ? &state_.drifts : nullptr,
                        .activation_checkpointing = config_.activation_checkpointing,
                        .seed = config_.seed,
                        .step = state_.step,
                        .exit_weights = ExitWeightsAt(state_.step),
                        .teacher = teacher_.get()},
                       lora());
    } catch (const Error& error) {
      status_.Finish();
      if (error.code() != "train.diverged") throw;
      throw Error(error.code(), std::string(error.what()).substr(error.code().size() + 3) +
                                    "; last checkpoint: " +
                                    (summary_.checkpoint.empty() ? "none" : summary_.checkpoint));
    }
    flops_now += GlobalOpCounter().Total() - flops_before;
    UpdateDuals(step.statistics);
    const int64_t tokens = config_.global_batch_size * config_.seq_len;
    state_.step += 1;
    state_.tokens += tokens;
    state_.next_sequence += config_.global_batch_size;
    tokens_now += tokens;
    const double seconds = report::MonotonicSeconds() - start;
    summary_.seconds += seconds;
    summary_.loss = step.loss;
    Log(step, lr, target, seconds);
    const bool last = state_.step == total_steps_;
    if (last) Settle();
    if (last || (config_.eval_every > 0 && state_.step % config_.eval_every == 0)) {
      Validate();
      if (!last && Recovered()) {
        Settle();
        Validate();
        summary_.stopped_by = "recovered";
        Save();
        break;
      }
    }
    if (last || (config_.save_every > 0 && state_.step % config_.save_every == 0)) Save();
    if (last) break;
    if (stop_requested_()) {
      summary_.stopped_by = "signal";
    } else if (config_.max_time_s > 0 && summary_.seconds >= config_.max_time_s) {
      summary_.stopped_by = "max-time";
      Validate();
    }
    if (summary_.stopped_by != "done") {
      Save();
      break;
    }
  }
  status_.Finish();
  summary_.steps = state_.step;
  summary_.tokens = state_.tokens;
  summary_.tokens_per_s = tokens_now / std::max(summary_.seconds - seconds_before, 1e-9);
  summary_.train_flops_per_token =
      static_cast<double>(flops_now) / static_cast<double>(std::max<int64_t>(tokens_now, 1));
  summary_.peak_rss_bytes = report::PeakRssBytes();
  const Json json = {{"steps", summary_.steps},
                     {"tokens", summary_.tokens},
                     {"seconds", summary_.seconds},
                     {"tokens_per_s", summary_.tokens_per_s},
                     {"peak_rss_bytes", summary_.peak_rss_bytes},
                     {"val_loss", summary_.val_loss},
                     {"val_bits_per_byte", summary_.val_bits_per_byte},
                     {"val_share", summary_.val_share},
                     {"teacher_val_loss", teacher_loss_ ? Json(*teacher_loss_) : Json()},
                     {"train_forward_flops_per_token", summary_.train_flops_per_token},
                     {"serving_flops_per_token", summary_.serving_flops_per_token},
                     {"trained_parameters", optimizer_->CountParameters()},
                     {"adapter_parameters", lora_ ? lora_->CountParameters() : 0},
                     {"stopped_by", summary_.stopped_by}};
  io::WriteFileAtomic(config_.out_dir + "/summary.json", json.dump(2) + "\n");
  return summary_;
}

}  // namespace

TrainSummary RunTraining(const TrainConfig& config, const std::function<bool()>& stop_requested) {
  return Run(config, stop_requested).Train();
}

}  // namespace detour::train
