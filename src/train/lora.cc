#include "train/lora.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <span>

#include "core/error.h"
#include "core/threads.h"
#include "io/safetensors.h"

namespace detour::train {

namespace {

/// What a target is called in a layer.
struct Target {
  const char* key;
  const char* name;
};
constexpr Target kTargets[] = {{"q", "self_attn.q_proj"}, {"k", "self_attn.k_proj"},
                               {"v", "self_attn.v_proj"}, {"o", "self_attn.o_proj"},
                               {"gate", "mlp.gate_proj"}, {"up", "mlp.up_proj"},
                               {"down", "mlp.down_proj"}};

std::map<std::string, std::string> Metadata(const LoraOptions& o) {
  return {{"rank", fmt::format("{}", o.rank)},
          {"alpha", fmt::format("{}", o.alpha)},
          {"targets", o.targets}};
}

}  // namespace

std::vector<std::string> ParseLoraTargets(const std::string& text) {
  std::vector<std::string> targets;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string key = text.substr(begin, end - begin);
    const bool known = std::any_of(std::begin(kTargets), std::end(kTargets),
                                   [&](const Target& t) { return key == t.key; });
    if (!known || std::find(targets.begin(), targets.end(), key) != targets.end()) return {};
    targets.push_back(key);
    begin = end + 1;
  }
  return targets;
}

Lora::Lora(model::Model& model, const LoraOptions& options, uint64_t seed)
    : options_(options), scale_(static_cast<float>(options.alpha / options.rank)) {
  const std::vector<std::string> keys = ParseLoraTargets(options.targets);
  std::vector<std::string> missing = keys;
  for (const Target& target : kTargets) {
    if (std::find(keys.begin(), keys.end(), target.key) == keys.end()) continue;
    model::ForEachTensor(model, [&](const std::string& name, at::Tensor& weight) {
      if (!name.ends_with(fmt::format(".{}.weight", target.name))) return;
      std::erase(missing, target.key);
      Adapter a{.name = name.substr(0, name.rfind('.')), .weight = weight};
      a.base_MK = weight.detach().clone();
      a.a_rK = at::empty({options.rank, weight.size(1)}, weight.options());
      a.b_Mr = at::zeros({weight.size(0), options.rank}, weight.options());
      model::DrawNormal(seed, a.name + ".lora_A.weight", 1.0 / options.rank, a.a_rK);
      weight.requires_grad_(true);
      adapters_.push_back(std::move(a));
    });
  }
  if (!missing.empty()) {
    Fail("train.config", "--lora-targets: no layer of this model has a matrix \"{}\"", missing[0]);
  }
}

void Lora::TakeGradients() {
  const at::NoGradGuard no_grad;
  for (Adapter& a : adapters_) {
    at::Tensor& g_MK = a.weight.mutable_grad();
    if (!g_MK.defined()) continue;
    a.a_rK.mutable_grad() = at::mm(a.b_Mr.t(), g_MK).mul_(scale_);
    a.b_Mr.mutable_grad() = at::mm(g_MK, a.a_rK.t()).mul_(scale_);
    g_MK = at::Tensor();
  }
}

void Lora::Sum(const Adapter& adapter, float* out_MK) const {
  const int64_t rows = adapter.base_MK.size(0), width = adapter.base_MK.size(1);
  const float* base = ops::F32(adapter.base_MK);
  const float* a = ops::F32(adapter.a_rK);
  const float* b = ops::F32(adapter.b_Mr);
  ParallelFor(0, rows, std::max<int64_t>(1, (1 << 14) / width), [&](int64_t begin, int64_t end) {
    std::vector<float> sum(width);
    for (int64_t m = begin; m < end; ++m) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t r = 0; r < options_.rank; ++r) {
        const float b_mr = b[m * options_.rank + r];
        for (int64_t k = 0; k < width; ++k) sum[k] += b_mr * a[r * width + k];
      }
      for (int64_t k = 0; k < width; ++k) {
        out_MK[m * width + k] = base[m * width + k] + scale_ * sum[k];
      }
    }
  });
}

void Lora::Merge() {
  const at::NoGradGuard no_grad;
  for (Adapter& a : adapters_) {
    Sum(a, ops::F32(a.weight));
    // The packed copy of the weight follows the version.
    torch::autograd::impl::bump_version(a.weight);
  }
}

void Lora::ForEachAdapter(const routing::TensorVisitor& visit) {
  for (Adapter& a : adapters_) {
    visit(a.name + ".lora_A.weight", a.a_rK);
    visit(a.name + ".lora_B.weight", a.b_Mr);
  }
}

void Lora::ForEachTensor(const routing::TensorVisitor& visit) {
  ForEachAdapter(visit);
  for (Adapter& a : adapters_) visit(a.name + ".base_layer.weight", a.base_MK);
}

int64_t Lora::CountParameters() {
  int64_t count = 0;
  ForEachAdapter([&](const std::string&, at::Tensor& t) { count += t.numel(); });
  return count;
}

void Lora::Save(const std::string& path) {
  std::vector<io::TensorToWrite> tensors;
  ForEachTensor([&](const std::string& name, at::Tensor& t) {
    tensors.push_back({name, io::DType::kF32, t.sizes().vec(),
                       std::as_bytes(std::span(ops::F32(t), static_cast<size_t>(t.numel())))});
  });
  io::WriteSafetensors(path, tensors, Metadata(options_));
}

void Lora::Load(const std::string& path) {
  const at::NoGradGuard no_grad;
  const io::SafetensorsFile file = io::SafetensorsFile::Open(path);
  ForEachTensor([&](const std::string& name, at::Tensor& t) {
    if (t.sizes() != at::IntArrayRef(file.Get(name).shape)) {
      Fail("train.checkpoint", "{}: {}: the shape is not the adapter's", path, name);
    }
    file.ReadF32Into(name, {ops::F32(t), static_cast<size_t>(t.numel())});
  });
  for (const Adapter& a : adapters_) {
    at::Tensor sum_MK = at::empty_like(a.base_MK);
    Sum(a, ops::F32(sum_MK));
    if (std::memcmp(ops::F32(sum_MK), ops::F32(a.weight), sum_MK.nbytes()) != 0) {
      Fail("train.checkpoint",
           "{}: base and adapters of {} do not add up to the weights in model.safetensors", path,
           a.name);
    }
  }
}

}  // namespace detour::train
