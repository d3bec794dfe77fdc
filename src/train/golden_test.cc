// Parity with answers nobody here wrote: the public DTRNet code, transformers' Llama, torch's AdamW
// (tests/golden, made by scripts/golden; manifest.json says how).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "io/safetensors.h"
#include "ops/rows.h"
#include "train/optimizer.h"
#include "train/step.h"

namespace detour::train {
namespace {

namespace fs = std::filesystem;

constexpr double kValueTolerance = 1e-5;
constexpr double kGradientTolerance = 1e-4;

const std::string kGolden = std::string(DETOUR_SOURCE_DIR) + "/tests/golden/";

struct Case {
  io::SafetensorsFile file;
  int64_t num_sequences, seq_len;
  eval::Batch batch;

  explicit Case(const std::string& dir)
      : file(io::SafetensorsFile::Open(dir + "/golden.safetensors")) {
    const std::vector<int64_t> shape = file.Get("input_ids").shape;
    num_sequences = shape[0];
    seq_len = shape[1];
    batch.ids_N = Ints("input_ids");
    SplitDocuments(file.Has("document_ids"));
    std::vector<int32_t> targets(num_sequences * seq_len, -1);
    const int32_t* ids = ops::I32(batch.ids_N);
    for (int64_t n = 0; n < num_sequences * seq_len; ++n) {
      if ((n + 1) % seq_len != 0) targets[n] = ids[n + 1];
    }
    batch.targets_N = file.Has("targets") ? Ints("targets") : at::tensor(targets, at::kInt);
  }

  at::Tensor Ints(const std::string& name) const {
    return at::tensor(file.ReadI32(name), at::kInt);
  }

  void SplitDocuments(bool by_document) {
    std::vector<int32_t> documents(num_sequences * seq_len);
    if (by_document) documents = file.ReadI32("document_ids");
    std::vector<routing::Segment> segments;
    for (int64_t n = 0; n < num_sequences * seq_len; ++n) {
      if (n % seq_len == 0 || documents[n] != documents[n - 1]) {
        segments.push_back({static_cast<int32_t>(n / seq_len), n, n + 1, 0});
      }
      segments.back().end = n + 1;
    }
    batch.stream = routing::Stream::FromSegments(std::move(segments));
  }
};

void ExpectClose(const io::SafetensorsFile& file, const std::string& name, const at::Tensor& actual,
                 double tolerance) {
  const std::vector<float> expected = file.ReadF32(name);
  const at::Tensor flat = actual.detach().contiguous().view(-1);
  ASSERT_EQ(static_cast<int64_t>(expected.size()), flat.numel()) << name;
  double difference = 0, scale = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference = std::max<double>(difference, std::abs(flat.data_ptr<float>()[i] - expected[i]));
    scale = std::max<double>(scale, std::abs(expected[i]));
  }
  EXPECT_LE(difference, tolerance * scale) << name << ": relative " << difference / scale;
  EXPECT_FALSE(std::isnan(difference)) << name;
}

double Lambda(const model::Model& m) {
  return m.config.routing.empty() ? 0 : m.config.routing[0].Number("aux_loss_coeff");
}

/// Walks the layers as stack.cc does, comparing what the golden has; given rows replace those of a
/// fallback. Returns the plans.
std::vector<routing::LayerPlans> WalkLayers(const model::Model& m, const Case& c,
                                            const std::string& mode, bool compare) {
  const at::NoGradGuard no_grad;
  at::Tensor x = ops::Embed(m.embed, c.batch.ids_N);
  std::vector<routing::LayerPlans> plans;
  for (int32_t l = 0; l < m.config.num_layers; ++l) {
    const auto decide = [&](routing::Site site, const routing::Taps& taps) {
      routing::Plan plan = Decide(m, l, site, taps, {});
      const std::string rows_name = fmt::format("fallback.layer{}.rows", l);
      if (mode == "train" && site == routing::Site::kMixer && c.file.Has(rows_name)) {
        std::vector<uint8_t> flags(x.size(0));
        for (int32_t row : c.file.ReadI32(rows_name)) flags[row] = 1;
        SetRows(flags, &plan);
        return m.layers[l].router(site)->Decide(taps, {.layer = l, .replay = &plan});
      }
      return plan;
    };
    x = RunLayer(m, m.layers[l], x, c.batch.stream, decide, nullptr, &plans.emplace_back());
    if (!compare) continue;
    const std::string prefix = fmt::format("{}.layer{}.", mode, l);
    if (c.file.Has(prefix + "output")) ExpectClose(c.file, prefix + "output", x, kValueTolerance);
    if (c.file.Has(prefix + "router_probs")) {
      ExpectClose(c.file, prefix + "router_probs", plans.back().mixer.scores_NC, kValueTolerance);
    }
  }
  return plans;
}

class Golden : public testing::TestWithParam<std::string> {};

TEST_P(Golden, ForwardAndGradients) {
  const std::string dir = kGolden + GetParam();
  const Case c(dir);
  model::Model m = model::LoadModel(dir);
  WalkLayers(m, c, "eval", /*compare=*/true);
  {
    const at::NoGradGuard no_grad;
    const at::Tensor logits = Logits(m, Forward(m, c.batch.ids_N, c.batch.stream, {}));
    ExpectClose(c.file, "eval.logits", logits, kValueTolerance);
    if (c.file.Has("eval.logits_f64")) {
      // The rule of the parity ladder: the error against f64 is at most 4 times that of torch in
      // f32.
      const auto f64 = c.file.ReadF32("eval.logits_f64");
      const auto f32 = c.file.ReadF32("eval.logits");
      double ours = 0, torchs = 0;
      for (size_t i = 0; i < f64.size(); ++i) {
        ours = std::max<double>(ours, std::abs(ops::F32(logits)[i] - f64[i]));
        torchs = std::max<double>(torchs, std::abs(f32[i] - f64[i]));
      }
      EXPECT_LE(ours, 4 * torchs);
    }
  }
  if (!c.file.Has("train.loss")) return;
  const std::vector<std::vector<routing::LayerPlans>> plans = {WalkLayers(m, c, "train", false)};
  for (const bool checkpointing : {false, true}) {
    AdamW optimizer(m, {});
    optimizer.ZeroGrad();
    const StepResult step = ComputeGradients(
        m, {c.batch}, {.activation_checkpointing = checkpointing, .replay = &plans});
    const double aux = step.aux_loss * Lambda(m);
    ExpectClose(c.file, "train.loss", at::tensor({static_cast<float>(step.loss + aux)}),
                kValueTolerance);
    if (c.file.Has("train.total_aux_loss")) {
      ExpectClose(c.file, "train.total_aux_loss", at::tensor({static_cast<float>(step.aux_loss)}),
                  kValueTolerance);
    }
    ForEachTensor(m, [&](const std::string& name, at::Tensor& t) {
      const at::Tensor grad = t.grad().defined() ? t.grad() : at::zeros_like(t);
      ExpectClose(c.file, "train.grad." + name, grad, kGradientTolerance);
    });
  }
}

std::vector<std::string> CaseNames() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(kGolden)) {
    const std::string name = entry.path().filename();
    if (name.starts_with("dense_") || name.starts_with("dtrnet_")) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

INSTANTIATE_TEST_SUITE_P(All, Golden, testing::ValuesIn(CaseNames()),
                         [](const auto& info) { return info.param; });

TEST(Golden, CasesAreThere) { EXPECT_GE(CaseNames().size(), 15u); }

TEST(Golden, RowsOfAMicroBatchAreThoseOfTheGlobalBatch) {
  // Two micro-batches of one sequence give the loss, shares and gradients of one batch of two.
  const std::string dir = kGolden + "dtrnet_gqa";
  const Case c(dir);
  model::Model m = model::LoadModel(dir);
  std::vector<eval::Batch> split(2);
  for (int64_t b = 0; b < 2; ++b) {
    split[b].ids_N = c.batch.ids_N.slice(0, b * c.seq_len, (b + 1) * c.seq_len).contiguous();
    split[b].targets_N =
        c.batch.targets_N.slice(0, b * c.seq_len, (b + 1) * c.seq_len).contiguous();
    split[b].stream = routing::Stream::FromSegments({{0, 0, c.seq_len, 0}});
    split[b].first_row = b * c.seq_len;
  }
  AdamW optimizer(m, {});
  optimizer.ZeroGrad();
  const StepResult step = ComputeGradients(m, split, {});
  ExpectClose(c.file, "train.total_aux_loss", at::tensor({static_cast<float>(step.aux_loss)}),
              kValueTolerance);
  ForEachTensor(m, [&](const std::string& name, at::Tensor& t) {
    ExpectClose(c.file, "train.grad." + name, t.grad(), kGradientTolerance);
  });
}

class GoldenAdamW : public testing::TestWithParam<std::string> {};

TEST_P(GoldenAdamW, TenSteps) {
  const std::string dir = kGolden + GetParam();
  const auto file = io::SafetensorsFile::Open(dir + "/golden.safetensors");
  const std::vector<int64_t> shape = file.Get("input_ids").shape;  // [steps, B, T]
  const std::vector<int32_t> ids = file.ReadI32("input_ids");
  const std::vector<float> lr = file.ReadF32("lr");
  const std::vector<float> losses = file.ReadF32("losses"), norms = file.ReadF32("grad_norms");
  model::Model m = model::LoadModel(dir);
  AdamW optimizer(m, {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1});
  const int64_t rows = shape[1] * shape[2];
  for (int64_t step = 0; step < shape[0]; ++step) {
    const std::vector<int32_t> step_ids(ids.begin() + step * rows, ids.begin() + (step + 1) * rows);
    std::vector<int32_t> targets(rows, -1);
    std::vector<routing::Segment> segments;
    for (int64_t b = 0; b < shape[1]; ++b) {
      segments.push_back({static_cast<int32_t>(b), b * shape[2], (b + 1) * shape[2], 0});
      for (int64_t t = 0; t + 1 < shape[2]; ++t) {
        targets[b * shape[2] + t] = step_ids[b * shape[2] + t + 1];
      }
    }
    eval::Batch batch{at::tensor(step_ids, at::kInt), at::tensor(targets, at::kInt),
                      routing::Stream::FromSegments(std::move(segments)), 0};
    const StepResult result =
        TrainStep(m, optimizer, {batch}, {.lr = lr[step], .grad_clip = 1.0, .step = step});
    const double loss = result.loss + result.aux_loss * Lambda(m);
    EXPECT_NEAR(loss, losses[step], 1e-5 * losses[step]) << "step " << step;
    EXPECT_NEAR(result.grad_norm, norms[step], 1e-4 * norms[step]) << "step " << step;
  }
  ForEachTensor(m, [&](const std::string& name, at::Tensor& t) {
    ExpectClose(file, "final." + name, t, kGradientTolerance);
  });
}

INSTANTIATE_TEST_SUITE_P(All, GoldenAdamW, testing::Values("adamw_dense", "adamw_dtrnet"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace detour::train
