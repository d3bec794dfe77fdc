#include "train/lora.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>

#include "core/error.h"
#include "core/rng.h"
#include "core/threads.h"
#include "ops/rows.h"
#include "train/config.h"
#include "train/step.h"

namespace detour::train {
namespace {

constexpr char kAll[] = "q,k,v,o,gate,up,down";

model::Model SmallModel(const char* method) {
  const model::ModelConfig config = model::ParseConfig({{"vocab_size", 60},
                                                        {"hidden_size", 32},
                                                        {"intermediate_size", 48},
                                                        {"num_hidden_layers", 3},
                                                        {"num_attention_heads", 2},
                                                        {"num_key_value_heads", 1},
                                                        {"initializer_range", 0.2},
                                                        {"routing", {{"method", method}}}},
                                                       "test");
  model::Model m = model::AllocateModel(config);
  InitializeWeights(m, 3);
  return m;
}

/// `num_sequences` sequences of 40 tokens, the first of them number `first`.
eval::Batch MakeBatch(int64_t first, int64_t num_sequences) {
  constexpr int64_t kLength = 40;
  const Rng rng(1, RngPurpose::kTest);
  std::vector<int32_t> ids, targets;
  std::vector<routing::Segment> segments;
  for (int64_t b = 0; b < num_sequences; ++b) {
    segments.push_back({static_cast<int32_t>(b), b * kLength, (b + 1) * kLength, 0});
    for (int64_t t = 0; t < kLength; ++t) {
      const int64_t at = (first + b) * kLength + t;
      ids.push_back(static_cast<int32_t>(rng.Below(at, 60)));
      targets.push_back(static_cast<int32_t>(rng.Below(at + 1, 60)));
    }
  }
  return {at::tensor(ids, at::kInt), at::tensor(targets, at::kInt),
          routing::Stream::FromSegments(std::move(segments)), first * kLength};
}

/// Every adapter as it may look after some steps: B starts as zero.
void Shake(Lora& lora) {
  const at::NoGradGuard no_grad;
  lora.ForEachAdapter(
      [](const std::string& name, at::Tensor& t) { model::DrawNormal(5, name, 0.1, t); });
  lora.Merge();
}

using Tensors = std::map<std::string, at::Tensor>;

Tensors CopyOf(model::Model& m) {
  Tensors copy;
  ForEachTensor(m,
                [&](const std::string& name, at::Tensor& t) { copy[name] = t.detach().clone(); });
  return copy;
}

bool SameBits(const at::Tensor& a, const at::Tensor& b) {
  return a.sizes() == b.sizes() && std::memcmp(ops::F32(a), ops::F32(b), a.nbytes()) == 0;
}

/// Gradients of the adapters by name.
Tensors Gradients(Lora& lora) {
  Tensors gradients;
  lora.ForEachAdapter([&](const std::string& name, at::Tensor& t) { gradients[name] = t.grad(); });
  return gradients;
}

void ExpectNear(const at::Tensor& got, const at::Tensor& expected, double tolerance,
                const std::string& name) {
  ASSERT_TRUE(got.defined() && expected.defined()) << name;
  const double norm = expected.norm().item<double>();
  EXPECT_GT(norm, 0) << name;
  EXPECT_LE((got - expected).norm().item<double>(), tolerance * norm) << name;
}

TEST(Lora, Targets) {
  EXPECT_EQ(ParseLoraTargets("q,k,v"), (std::vector<std::string>{"q", "k", "v"}));
  EXPECT_EQ(ParseLoraTargets("down"), std::vector<std::string>{"down"});
  for (const char* wrong : {"", ",", "q,", ",q", "q,q", "q,x", "q k", "Q", "q,k,v,head"}) {
    EXPECT_TRUE(ParseLoraTargets(wrong).empty()) << wrong;
  }
}

TEST(Lora, StartsAsTheBaseToTheBit) {
  model::Model m = SmallModel("dtrnet");
  const Tensors before = CopyOf(m);
  Lora lora(m, {.rank = 4, .targets = kAll}, 42);
  for (const bool merged : {false, true}) {
    if (merged) lora.Merge();
    ForEachTensor(m, [&](const std::string& name, at::Tensor& t) {
      EXPECT_TRUE(SameBits(t.detach(), before.at(name))) << name;
    });
  }
  EXPECT_EQ(lora.CountParameters(), 3 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80));
}

TEST(Lora, AdaptersDependOnSeedAndNameAlone) {
  model::Model a = SmallModel("dtrnet"), b = SmallModel("dllm");
  Tensors of_a;
  Lora(a, {.rank = 4, .targets = "q,v"}, 42)
      .ForEachAdapter([&](const std::string& name, at::Tensor& t) { of_a[name] = t; });
  EXPECT_EQ(of_a.size(), 12u);
  Lora(b, {.rank = 4, .targets = "v"}, 42)
      .ForEachAdapter([&](const std::string& name, at::Tensor& t) {
        EXPECT_TRUE(SameBits(t, of_a.at(name))) << name;
      });
  const at::Tensor& drawn = of_a.at("model.layers.1.self_attn.q_proj.lora_A.weight");
  EXPECT_NEAR(drawn.std().item<double>(), 0.25, 0.06);  // 128 draws
}

/// dA and dB against libtorch's autograd through base + s·B·A.
TEST(Lora, GradientsAreThoseOfTheComposedMatrix) {
  for (const char* method : {"dtrnet", "dllm"}) {
    for (const bool checkpointing : {false, true}) {
      model::Model m = SmallModel(method);
      const LoraOptions options{.rank = 4, .alpha = 6, .targets = kAll};
      Lora lora(m, options, 42);
      Shake(lora);
      const std::vector<eval::Batch> batches = {MakeBatch(0, 2)};
      const StepOptions step{.activation_checkpointing = checkpointing, .seed = 1};
      ComputeGradients(m, batches, step);
      lora.TakeGradients();
      const Tensors got = Gradients(lora);

      model::Model twin = SmallModel(method);
      Tensors adapters;
      lora.ForEachAdapter([&](const std::string& name, at::Tensor& t) {
        adapters[name] = t.detach().clone().requires_grad_();
      });
      ForEachTensor(twin, [&](const std::string& name, at::Tensor& t) {
        const std::string prefix = name.substr(0, name.rfind('.'));
        if (!adapters.count(prefix + ".lora_A.weight")) return;
        t = t.detach() + 1.5 * at::mm(adapters.at(prefix + ".lora_B.weight"),
                                      adapters.at(prefix + ".lora_A.weight"));
      });
      ComputeGradients(twin, batches, step);
      EXPECT_EQ(got.size(), 2u * 3 * 7);
      for (const auto& [name, tensor] : adapters) {
        ExpectNear(got.at(name), tensor.grad(), 1e-4, name);
      }
    }
  }
}

TEST(Lora, ActivationCheckpointingChangesNoBit) {
  // "k" alone: below the first layer nothing carries a gradient, and there only the keys do.
  for (const char* targets : {"k", "q,k,v"}) {
    Tensors plain;
    for (const bool checkpointing : {false, true}) {
      model::Model m = SmallModel("dllm");
      Lora lora(m, {.rank = 4, .targets = targets}, 42);
      Shake(lora);
      ComputeGradients(m, {MakeBatch(0, 2)}, {.activation_checkpointing = checkpointing});
      lora.TakeGradients();
      for (const auto& [name, grad] : Gradients(lora)) {
        ASSERT_TRUE(grad.defined()) << name;
        if (checkpointing) {
          EXPECT_TRUE(SameBits(grad, plain.at(name))) << name;
        }
        plain[name] = grad;
      }
    }
  }
}

TEST(Lora, MicroBatchesAreOneBatch) {
  Tensors whole;
  for (const bool split : {false, true}) {
    model::Model m = SmallModel("dtrnet");
    Lora lora(m, {.rank = 4}, 42);
    Shake(lora);
    ComputeGradients(
        m, split ? std::vector{MakeBatch(0, 1), MakeBatch(1, 1)} : std::vector{MakeBatch(0, 2)},
        {});
    lora.TakeGradients();
    for (const auto& [name, grad] : Gradients(lora)) {
      if (split) ExpectNear(grad, whole.at(name), 1e-4, name);
      whole[name] = grad;
    }
  }
}

TEST(Lora, FrozenWeightsStayAndHaveNoGradients) {
  model::Model m = SmallModel("dllm");
  Lora lora(m, {.rank = 4, .targets = "q,v"}, 42);
  AdamW optimizer(
      [&](const routing::TensorVisitor& visit) {
        for (model::LayerWeights& layer : m.layers) ForEachRouterTensor(layer, visit);
        lora.ForEachAdapter(visit);
      },
      {});
  const Tensors before = CopyOf(m);
  for (int64_t step = 0; step < 3; ++step) {
    TrainStep(m, optimizer, {MakeBatch(step, 1), MakeBatch(step + 1, 1)},
              {.lr = 0.01, .target_share = 0.5, .step = step}, &lora);
  }
  int64_t changed = 0;
  ForEachTensor(m, [&](const std::string& name, at::Tensor& t) {
    const bool target = name.ends_with("q_proj.weight") || name.ends_with("v_proj.weight");
    const bool learns = target || name.find("router") != std::string::npos;
    if (!learns) {
      EXPECT_FALSE(t.requires_grad()) << name;
    }
    if (target || !learns) {
      EXPECT_FALSE(t.grad().defined()) << name;
      EXPECT_EQ(SameBits(t.detach(), before.at(name)), !target) << name;
    } else {
      changed += !SameBits(t.detach(), before.at(name));
    }
  });
  EXPECT_GT(changed, 0);
}

TEST(Lora, MergedWeightsDoNotDependOnThreadsAndReachTheKernels) {
  const int threads = NumThreads();
  Tensors one;
  for (const int n : {1, 2}) {
    SetNumThreads(n);
    model::Model m = SmallModel("dtrnet");
    const eval::Batch batch = MakeBatch(0, 2);
    const auto logits = [&] {
      const at::NoGradGuard no_grad;
      return Logits(m, Forward(m, batch.ids_N, batch.stream, {}));
    };
    const at::Tensor before = logits();  // packs the matrices
    Lora lora(m, {.rank = 4, .targets = kAll}, 42);
    Shake(lora);
    EXPECT_FALSE(SameBits(logits(), before));
    Tensors now = CopyOf(m);
    now["logits"] = logits();
    for (const auto& [name, t] : now) {
      if (n == 2) {
        EXPECT_TRUE(SameBits(t, one.at(name))) << name;
      }
      one[name] = t;
    }
  }
  SetNumThreads(threads);
}

TEST(Lora, SavedAndLoaded) {
  const std::string path =
      (std::filesystem::temp_directory_path() / "detour_lora_test.safetensors").string();
  model::Model m = SmallModel("dtrnet");
  const Tensors base = CopyOf(m);
  Lora lora(m, {.rank = 4}, 42);
  Shake(lora);
  lora.Save(path);
  const Tensors merged = CopyOf(m);
  model::Model again = SmallModel("dtrnet");
  ForEachTensor(again, [&](const std::string& name, at::Tensor& t) { t.copy_(merged.at(name)); });
  Lora read(again, {.rank = 4}, 7);
  read.Load(path);
  Tensors adapters;
  lora.ForEachAdapter([&](const std::string& name, at::Tensor& t) { adapters[name] = t; });
  read.ForEachAdapter([&](const std::string& name, at::Tensor& t) {
    EXPECT_TRUE(SameBits(t, adapters.at(name))) << name;
  });
  read.Merge();
  ForEachTensor(again, [&](const std::string& name, at::Tensor& t) {
    EXPECT_TRUE(SameBits(t.detach(), merged.at(name))) << name;
  });
  // Other weights beside it, another rank, other targets.
  model::Model other = SmallModel("dtrnet");
  EXPECT_THROW(Lora(other, {.rank = 4}, 7).Load(path), Error);
  EXPECT_THROW(Lora(other, {.rank = 5}, 7).Load(path), Error);
  EXPECT_THROW(Lora(other, {.rank = 4, .targets = "q,o"}, 7).Load(path), Error);
  std::filesystem::remove(path);
}

TEST(Lora, ATargetThatTheModelHasNotIsRefused) {
  model::Model m = SmallModel("moe");  // experts in every layer
  EXPECT_THROW(Lora(m, {.targets = "q,gate"}, 1), Error);
}

TEST(Train, WhatIsTrainedIsChecked) {
  const auto check = [](const char* method, auto set) {
    TrainConfig c;
    set(c);
    CheckTrained(c, method ? SmallModel(method).config : DenseTwin(SmallModel("dtrnet").config));
  };
  check(nullptr, [](TrainConfig& c) { c.train = "lora"; });
  check("early_exit", [](TrainConfig& c) { c.train = "lora"; });
  for (const char* train : {"all", "router", "lora", "router+lora"}) {
    check("dtrnet", [&](TrainConfig& c) { c.train = train; });
  }
  for (const char* train : {"router", "router+lora", "routers", ""}) {
    EXPECT_THROW(check(nullptr, [&](TrainConfig& c) { c.train = train; }), Error) << train;
  }
  EXPECT_THROW(check("early_exit", [](TrainConfig& c) { c.train = "router"; }), Error);
  EXPECT_THROW(check("dtrnet", [](TrainConfig& c) { c.lora.rank = 4; }), Error);
  const auto lora = [&](auto set) {
    check("dtrnet", [&](TrainConfig& c) {
      c.train = "lora";
      set(c.lora);
    });
  };
  lora([](LoraOptions& o) { o.rank = 32; });
  for (const int64_t rank : {0, -1, 33}) {
    EXPECT_THROW(lora([&](LoraOptions& o) { o.rank = rank; }), Error) << rank;
  }
  for (const double alpha : {0.0, -1.0, std::nan(""), HUGE_VAL}) {
    EXPECT_THROW(lora([&](LoraOptions& o) { o.alpha = alpha; }), Error) << alpha;
  }
  try {
    lora([](LoraOptions& o) { o = {.rank = 0, .alpha = -1, .targets = "x"}; });
    FAIL();
  } catch (const Error& error) {
    for (const char* flag : {"--lora-rank", "--lora-alpha", "--lora-targets"}) {
      EXPECT_NE(std::string(error.what()).find(flag), std::string::npos) << flag;
    }
  }
}

}  // namespace
}  // namespace detour::train
