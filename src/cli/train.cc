#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>

#include "cli/commands.h"
#include "cli/common.h"
#include "cli/run_config.h"
#include "cli/signals.h"
#include "model/cost.h"
#include "report/table.h"
#include "train/loop.h"

namespace detour::cli {

namespace {

struct Options {
  train::TrainConfig train;
  RuntimeOptions runtime;
  bool dry_run = false;
};

void AddModelFlags(CLI::App& sub, train::TrainConfig& c) {
  sub.add_option("--data", c.data_dir, "Directory made by detour prepare")->required();
  sub.add_option("--out-dir", c.out_dir, "Checkpoints, metrics.jsonl")->required();
  sub.add_option("--model-config", c.model_config, "config.json of a new model");
  sub.add_option("--init-from", c.init_from,
                 "Model directory to start from instead; a dense one gets new routers of --method");
  sub.add_option("--tokenizer", c.tokenizer_dir,
                 "Tokenizer to store in checkpoints (default: the one beside the data)");
  sub.add_option("--method", c.method,
                 "dense, a routing method, or several joined by +, over the model config's");
  sub.add_option(
      "--layout", c.layout,
      "Routed layers: bilayer, bilayer_dense_ends, trilayer, all, all_but_two, middle, or "
      "1,3,5");
  sub.add_option("--routing", c.routing,
                 "KEY=VALUE or METHOD.KEY=VALUE: an option of the method (docs/routing.md)")
      ->allow_extra_args(false);
  sub.add_option("--train", c.train,
                 "What is trained: all, router, lora (low-rank adapters beside frozen matrices) or "
                 "router+lora")
      ->capture_default_str();
  sub.add_option("--lora-rank", c.lora.rank, "Rank r of the adapters")->capture_default_str();
  sub.add_option("--lora-alpha", c.lora.alpha, "Adapters are scaled with alpha / rank")
      ->capture_default_str();
  sub.add_option("--lora-targets", c.lora.targets,
                 "Matrices with an adapter: some of q, k, v, o, gate, up, down")
      ->capture_default_str();
  sub.add_option("--teacher", c.distill.teacher,
                 "Model to distil from: its divergence KL(teacher || model) joins the loss");
  sub.add_option("--distill-weight", c.distill.weight,
                 "Weight of the divergence; the cross-entropy of the text keeps the rest")
      ->check(Number(0, 1))
      ->capture_default_str();
  sub.add_option("--distill-temperature", c.distill.temperature, "Of both softmaxes")
      ->check(Number(0.01, 100))
      ->capture_default_str();
  sub.add_option("--distill-hidden", c.distill.hidden,
                 "Weight of the distance between the states after each layer, ‖s - t‖² / ‖t‖²")
      ->check(Number(0))
      ->capture_default_str();
  sub.add_option("--stop-within", c.stop_within,
                 "Stop once --target-share is reached and validation perplexity is at most this "
                 "times the teacher's, e.g. 1.02; 0: run to the end")
      ->check(Number(0))
      ->capture_default_str();
  sub.add_option("--aux-loss-coeff", c.aux_loss_coeff, "Weight λ of the method's budget")
      ->check(Number(0));
  sub.add_option("--schedule", c.schedules,
                 "KNOB: FROM->TO SHAPE [BEGIN..END]; KNOB target_share, aux_loss_coeff, "
                 "temperature, capacity or routed_layers; SHAPE constant, linear, cosine or sine; "
                 "e.g. \"capacity: 1->0.125 cosine 0..0.3\"; several times")
      ->allow_extra_args(false);
  sub.add_option(
         "--target-share", c.target_share,
         "Share of tokens that attend in routed layers, held by the ratio controller; 0: off")
      ->check(Number(0, 1))
      ->capture_default_str();
  sub.add_option("--share-ramp", c.share_ramp,
                 "Part of the run in which the target falls from 1 to --target-share")
      ->check(Number(0, 1))
      ->capture_default_str();
  sub.add_option("--controller-rate", c.controller_rate,
                 "Part of the way to the batch's own threshold the controller moves in a step, at "
                 "least; more while the learning rate is near its peak")
      ->check(Number(0, 1))
      ->capture_default_str();
  sub.add_option("--controller-integral", c.controller_integral,
                 "Part of each move that it repeats in every later step: takes up a drift that "
                 "training itself adds, as with estimator ste and a teacher; e.g. 0.25")
      ->check(Number(0, 1))
      ->capture_default_str();
}

void AddScheduleFlags(CLI::App& sub, train::TrainConfig& c) {
  const auto positive = CLI::Range(int64_t{1}, int64_t{1} << 40);
  sub.add_option("--seq-len", c.seq_len, "Tokens per sequence")
      ->check(positive)
      ->capture_default_str();
  sub.add_option("--micro-batch-size", c.micro_batch_size, "Sequences per forward pass")
      ->check(positive)
      ->capture_default_str();
  sub.add_option("--global-batch-size", c.global_batch_size, "Sequences per step")
      ->check(positive)
      ->capture_default_str();
  sub.add_option("--max-steps", c.max_steps, "Steps of the run")->check(positive);
  sub.add_option("--max-tokens", c.max_tokens, "Tokens of the run, if --max-steps is not set")
      ->check(positive);
  sub.add_option("--max-time", c.max_time_s, "Seconds of training after which to save and stop")
      ->check(Number(0));
  sub.add_option("--lr", c.lr, "Peak learning rate")->check(Number(1e-30))->capture_default_str();
  sub.add_option("--min-lr", c.min_lr, "Learning rate at the end")
      ->check(Number(0))
      ->capture_default_str();
  sub.add_option("--warmup-steps", c.warmup_steps, "Steps of linear warm-up")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub.add_option("--lr-schedule", c.lr_schedule, "cosine or wsd")
      ->check(CLI::IsMember({"cosine", "wsd"}))
      ->capture_default_str();
  sub.add_option("--decay-ratio", c.decay_ratio, "Last part of a wsd run, in which the rate falls")
      ->check(Number(0, 1))
      ->capture_default_str();
  sub.add_option("--beta1", c.beta1, "AdamW")->check(Number(0, 0.999999))->capture_default_str();
  sub.add_option("--beta2", c.beta2, "AdamW")->check(Number(0, 0.999999))->capture_default_str();
  sub.add_option("--adam-eps", c.adam_eps, "AdamW")->check(Number(1e-30))->capture_default_str();
  sub.add_option("--weight-decay", c.weight_decay, "AdamW; norms and biases do not decay")
      ->check(Number(0))
      ->capture_default_str();
  sub.add_option("--grad-clip", c.grad_clip, "Largest gradient norm; 0: no clipping")
      ->check(Number(0))
      ->capture_default_str();
}

void AddRunFlags(CLI::App& sub, train::TrainConfig& c) {
  AddFlag(sub, "--document-attention,!--no-document-attention", c.document_attention,
          "Attention stays inside documents, positions restart with each");
  AddFlag(sub, "--activation-checkpointing,!--no-activation-checkpointing",
          c.activation_checkpointing, "Keep layer inputs only and recompute in the backward pass");
  sub.add_option("--seed", c.seed, "Of weights, data order and fallback")
      ->check(SeedRange())
      ->capture_default_str();
  sub.add_option("--eval-every", c.eval_every, "Steps between validations; 0: at the end only")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub.add_option("--eval-tokens", c.eval_tokens, "Validation tokens; 0: the whole split")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub.add_option("--save-every", c.save_every, "Steps between checkpoints; 0: at the end only")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  sub.add_option("--keep-last", c.keep_last, "Checkpoints to keep")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub.add_option("--log-every", c.log_every, "Steps between records of metrics.jsonl")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub.add_option("--tensorboard", c.tensorboard, "Directory for TensorBoard event files");
  sub.add_option("--resume", c.resume,
                 "Checkpoint to go on from; auto: the latest of --out-dir, or a new run");
}

void Train(const Options& options) {
  ApplyTrainingRuntimeOptions(options.runtime);
  const train::TrainConfig& c = options.train;
  RefuseGguf("--init-from", c.init_from);
  RefuseGguf("--teacher", c.distill.teacher);
  if (options.dry_run) {
    const model::ModelConfig m = train::ResolveModelConfig(c);
    fmt::print("model: {} parameters ({} in routers), method {}\nrun: {} steps of {} tokens\n",
               report::FormatCount(static_cast<double>(model::ParameterCount(m))),
               report::FormatCount(static_cast<double>(model::RouterParameterCount(m))),
               MethodName(m), train::TotalSteps(c), c.global_batch_size * c.seq_len);
    if (c.train != "all") fmt::print("trains: {}; the rest is frozen\n", c.train);
    return;
  }
  InstallStopHandler();
  const train::TrainSummary s = train::RunTraining(c, [] { return StopRequested(); });
  if (s.seconds == 0) return;  // the run was complete before
  const std::string validation = s.val_loss > 0
                                     ? fmt::format("validation loss {:.4f}, {:.4f} bits per byte, ",
                                                   s.val_loss, s.val_bits_per_byte)
                                     : "";
  const std::string serving =
      s.serving_flops_per_token > 0
          ? fmt::format(", {} serving", report::FormatCount(s.serving_flops_per_token))
          : "";
  fmt::print(
      "{}: {} steps, {} tokens in {} ({} tok/s), {}peak memory {}\nforward FLOP per token as "
      "executed: {} in training{}\n{}\n",
      s.stopped_by, s.steps, report::FormatCount(static_cast<double>(s.tokens)),
      report::FormatDuration(s.seconds), report::FormatCount(s.tokens_per_s), validation,
      report::FormatBytes(static_cast<double>(s.peak_rss_bytes)),
      report::FormatCount(s.train_flops_per_token), serving, s.checkpoint);
}

}  // namespace

void AddTrainCommand(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("train", "Train a model on packed shards");
  AddModelFlags(*sub, options->train);
  AddScheduleFlags(*sub, options->train);
  AddRunFlags(*sub, options->train);
  AddRuntimeOptions(*sub, &options->runtime);
  AddRunConfigOptions(*sub);
  sub->add_flag("--dry-run", options->dry_run, "Check the configuration, say what would run, stop");
  sub->footer(
      "Example:\n  detour train --data data/sotu --model-config configs/demo.json --method dtrnet "
      "--target-share 0.15 --max-steps 600 --out-dir out/dtrnet\n"
      "  detour train --data data/sotu --init-from out/dense/latest --method dllm "
      "--train router+lora --lora-rank 8 --max-steps 300 --out-dir out/dllm-lora");
  sub->callback([options] { Train(*options); });
}

}  // namespace detour::cli
