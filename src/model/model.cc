#include "model/model.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <set>

#include "core/error.h"
#include "core/rng.h"
#include "core/threads.h"
#include "io/atomic.h"
#include "io/sharded.h"
#include "model/cost.h"
#include "ops/rows.h"
#include "routing/registry.h"

namespace detour::model {

const at::Tensor& Model::RopeTable(const routing::Stream& stream) const {
  const int64_t needed = std::max<int64_t>(stream.num_positions, 1);
  if (!rope_table_.defined() || rope_table_.size(0) < needed) {
    int64_t size = 256;
    while (size < needed) size *= 2;
    rope_table_ = ops::MakeRopeTable(size, config.head_dim, config.rope_theta);
  }
  return rope_table_;
}

void ForEachRouterTensor(LayerWeights& layer, const routing::TensorVisitor& visit) {
  for (const auto& router : layer.routers) {
    if (router) router->ForEachTensor(visit);
  }
}

namespace {

/// The weights that layers share, beside routers: the same tensors, packed once.
void ShareWeights(const LayerWeights& from, LayerWeights* to) {
  to->input_norm = from.input_norm;
  to->post_norm = from.post_norm;
  to->q = from.q;
  to->k = from.k;
  to->v = from.v;
  to->o = from.o;
  to->ffn = from.ffn;
}

}  // namespace

void ForEachTensor(Model& model, const routing::TensorVisitor& visit) {
  visit("model.embed_tokens.weight", model.embed);
  for (int32_t l = 0; l < std::ssize(model.layers); ++l) {
    LayerWeights& w = model.layers[l];
    const std::string prefix = fmt::format("model.layers.{}.", l);
    if (const int32_t source = WeightsLayer(model.config, l); source != l) {
      ShareWeights(model.layers[source], &w);  // a visitor may have replaced them
      ForEachRouterTensor(w,
                          [&](const std::string& name, at::Tensor& t) { visit(prefix + name, t); });
      continue;
    }
    visit(prefix + "input_layernorm.weight", w.input_norm);
    visit(prefix + "self_attn.q_proj.weight", w.q.weight);
    visit(prefix + "self_attn.k_proj.weight", w.k.weight);
    visit(prefix + "self_attn.v_proj.weight", w.v.weight);
    visit(prefix + "self_attn.o_proj.weight", w.o.weight);
    visit(prefix + "post_attention_layernorm.weight", w.post_norm);
    if (w.ffn.gate.weight.defined()) {
      visit(prefix + "mlp.gate_proj.weight", w.ffn.gate.weight);
      visit(prefix + "mlp.up_proj.weight", w.ffn.up.weight);
      visit(prefix + "mlp.down_proj.weight", w.ffn.down.weight);
    }
    ForEachRouterTensor(w,
                        [&](const std::string& name, at::Tensor& t) { visit(prefix + name, t); });
    for (size_t e = 0; e < w.experts.size(); ++e) {
      const std::string expert = fmt::format("{}block_sparse_moe.experts.{}.", prefix, e);
      visit(expert + "w1.weight", w.experts[e].gate.weight);
      visit(expert + "w2.weight", w.experts[e].down.weight);
      visit(expert + "w3.weight", w.experts[e].up.weight);
    }
  }
  visit("model.norm.weight", model.norm);
  if (model.config.tie_word_embeddings) {
    model.head.weight = model.embed;  // a visitor may have replaced the embedding
  } else {
    visit("lm_head.weight", model.head.weight);
  }
}

KvShape KvShapeOf(const ModelConfig& c, int32_t layer) {
  KvShape shape{{c.num_kv_heads, c.head_dim}, {}};
  shape.layout.with_positions =
      HasRouter(c, layer, routing::Site::kLayer) || HasRouter(c, layer, routing::Site::kMixer);
  for (const routing::RoutingConfig& r : c.routing) {
    if (!r.HasLayer(layer)) continue;
    if (r.TextOr("bypass", "") == "window") shape.window = {r.Int("window"), r.Int("sink")};
    if (r.options.contains("block_size")) {
      shape.layout.block_pages = r.Int("block_size") / kernels::kPageEntries;
    }
  }
  return shape;
}

namespace {

FfnWeights AllocateFfn(const ModelConfig& c) {
  FfnWeights w;
  w.gate.weight = at::zeros({c.intermediate_size, c.hidden_size});
  w.up.weight = at::zeros({c.intermediate_size, c.hidden_size});
  w.down.weight = at::zeros({c.hidden_size, c.intermediate_size});
  return w;
}

/// Routers of every method that has this layer; room for their experts.
void AddRouters(const ModelConfig& c, int32_t l, LayerWeights* w) {
  for (const routing::RoutingConfig& r : c.routing) {
    if (!r.HasLayer(l)) continue;
    for (auto& router : routing::FindMethod(r.method).make(r, RouterShape(c), l)) {
      w->experts.resize(router->num_experts());
      w->routers[static_cast<size_t>(router->site())] = std::move(router);
    }
  }
}

}  // namespace

Model AllocateModel(const ModelConfig& c) {
  const double bytes = 4.0 * ParameterCount(c);
  const double memory = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  if (bytes > memory) {
    Fail("config.size", "a model of {:.3g} parameters needs {:.1f} GB, this machine has {:.1f} GB",
         bytes / 4, bytes / 1e9, memory / 1e9);
  }
  Model m;
  m.config = c;
  m.embed = at::zeros({c.vocab_size, c.hidden_size});
  m.norm = at::zeros({c.hidden_size});
  m.head.weight = c.tie_word_embeddings ? m.embed : at::zeros({c.vocab_size, c.hidden_size});
  const int64_t q_width = c.num_heads * c.head_dim, kv_width = c.num_kv_heads * c.head_dim;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    LayerWeights w;
    w.kv_layout = KvShapeOf(c, l).layout;
    if (const int32_t source = WeightsLayer(c, l); source != l) {
      ShareWeights(m.layers[source], &w);
      AddRouters(c, l, &w);
      m.layers.push_back(std::move(w));
      continue;
    }
    w.input_norm = at::zeros({c.hidden_size});
    w.post_norm = at::zeros({c.hidden_size});
    w.q.weight = at::zeros({q_width, c.hidden_size});
    w.k.weight = at::zeros({kv_width, c.hidden_size});
    w.v.weight = at::zeros({kv_width, c.hidden_size});
    w.o.weight = at::zeros({c.hidden_size, q_width});
    AddRouters(c, l, &w);
    for (FfnWeights& expert : w.experts) expert = AllocateFfn(c);
    if (w.experts.empty() || HasSharedExpert(c, l)) w.ffn = AllocateFfn(c);
    m.layers.push_back(std::move(w));
  }
  return m;
}

void DrawNormal(uint64_t seed, const std::string& name, double sigma, at::Tensor& t) {
  // FNV-1a of the name: a tensor's values do not depend on which others the model has.
  uint64_t hash = 0xcbf29ce484222325;
  for (const unsigned char ch : name) hash = (hash ^ ch) * 0x100000001b3;
  const Rng rng(seed, RngPurpose::kInit, static_cast<uint32_t>(hash),
                static_cast<uint32_t>(hash >> 32));
  float* data = ops::F32(t);
  ParallelFor(0, t.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i] = static_cast<float>(sigma * rng.Normal(i));
  });
}

void InitializeWeights(Model& model, uint64_t seed) {
  const double sigma = model.config.initializer_range;
  ForEachTensor(model, [&](const std::string& name, at::Tensor& t) {
    at::NoGradGuard no_grad;
    if (t.dim() == 1) {
      t.fill_(name.find("norm") != std::string::npos ? 1.0 : 0.0);
      return;
    }
    DrawNormal(seed, name, sigma, t);
  });
  for (LayerWeights& layer : model.layers) {
    for (const auto& router : layer.routers) {
      if (router) router->Initialize();
    }
  }
}

int64_t CountParameters(Model& model, bool routers_only) {
  int64_t count = 0;
  const auto add = [&](const std::string&, at::Tensor& t) { count += t.numel(); };
  if (!routers_only) {
    ForEachTensor(model, add);
  } else {
    for (LayerWeights& layer : model.layers) ForEachRouterTensor(layer, add);
  }
  return count;
}

Model LoadModel(const std::string& dir) {
  Model model = AllocateModel(LoadConfig(dir));
  const io::ShardedTensors file = io::ShardedTensors::Open(dir);
  std::set<std::string> expected;
  ForEachTensor(model, [&](const std::string& name, at::Tensor& t) {
    expected.insert(name);
    const io::TensorInfo& info = file.Get(name);
    if (t.sizes() != at::IntArrayRef(info.shape)) {
      Fail("model.load", "{}: {}: config.json asks for shape [{}], the file has [{}]", dir, name,
           fmt::join(t.sizes(), ", "), fmt::join(info.shape, ", "));
    }
    file.ReadF32Into(name, {ops::F32(t), static_cast<size_t>(t.numel())});
  });
  for (const std::string& name : file.Names()) {
    // Tied checkpoints may carry the head all the same; rotary buffers are recomputed.
    const bool harmless = name.ends_with("rotary_emb.inv_freq") ||
                          (model.config.tie_word_embeddings && name == "lm_head.weight");
    if (!expected.count(name) && !harmless) {
      Fail("model.load", "{}: unexpected tensor {}: config.json describes no such weight", dir,
           Printable(name));
    }
  }
  return model;
}

void SaveModel(Model& model, const std::string& dir) {
  Json config = ConfigToJson(model.config);
  config.erase("dtype");  // the newer name of the same key
  config["torch_dtype"] = "float32";
  io::WriteFile(dir + "/config.json", config.dump(2) + "\n");
  std::vector<io::TensorToWrite> tensors;
  ForEachTensor(model, [&](const std::string& name, at::Tensor& t) {
    tensors.push_back({name, io::DType::kF32, t.sizes().vec(),
                       std::as_bytes(std::span(ops::F32(t), static_cast<size_t>(t.numel())))});
  });
  io::WriteSafetensors(dir + "/model.safetensors", tensors);
}

}  // namespace detour::model
