#include "model/model.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <map>
#include <set>

#include "core/error.h"
#include "core/rng.h"
#include "core/threads.h"
#include "io/atomic.h"
#include "io/posix.h"
#include "io/sharded.h"
#include "model/cost.h"
#include "model/rope.h"
#include "ops/rows.h"
#include "routing/registry.h"

namespace detour::model {

const at::Tensor& Model::RopeTable(const routing::Stream& stream) const {
  const int64_t needed = std::max<int64_t>(stream.num_positions, 1);
  if (!rope_table_.defined() || rope_table_.size(0) < needed) {
    int64_t size = 256;
    while (size < needed) size *= 2;
    const RopeFrequencies rope = FrequenciesOf(config);
    rope_table_ = ops::MakeRopeTable(size, rope.inverse, rope.scale);
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
  to->q_norm = from.q_norm;
  to->k_norm = from.k_norm;
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
    const auto matrix = [&](const std::string& name, ops::Matrix& m) {
      if (!m.weight.defined()) return;
      visit(prefix + name + ".weight", m.weight);
      if (m.bias.defined()) visit(prefix + name + ".bias", m.bias);
    };
    visit(prefix + "input_layernorm.weight", w.input_norm);
    matrix("self_attn.q_proj", w.q);
    matrix("self_attn.k_proj", w.k);
    matrix("self_attn.v_proj", w.v);
    matrix("self_attn.o_proj", w.o);
    if (w.q_norm.defined()) visit(prefix + "self_attn.q_norm.weight", w.q_norm);
    if (w.k_norm.defined()) visit(prefix + "self_attn.k_norm.weight", w.k_norm);
    visit(prefix + "post_attention_layernorm.weight", w.post_norm);
    matrix("mlp.gate_proj", w.ffn.gate);
    matrix("mlp.up_proj", w.ffn.up);
    matrix("mlp.down_proj", w.ffn.down);
    matrix("mlp.shared_expert_gate", w.shared_gate);
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
  shape.layout.with_positions = HasRouter(c, layer, routing::Site::kLayer) ||
                                HasRouter(c, layer, routing::Site::kMixer) ||
                                SlidingWindow(c, layer) > 0;
  shape.window.size = SlidingWindow(c, layer);
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

/// Allocates matrices, as zeros or as shapes alone.
struct Allocator {
  bool shapes_only;
  at::Tensor Weight(int64_t outputs, int64_t inputs) const {
    const at::TensorOptions f32(at::kFloat);
    return shapes_only ? at::empty({outputs, inputs}, f32.device(at::kMeta))
                       : at::zeros({outputs, inputs}, f32);
  }
  ops::Matrix Matrix(int64_t outputs, int64_t inputs, bool bias) const {
    ops::Matrix m;
    m.weight = Weight(outputs, inputs);
    if (bias) m.bias = at::zeros({outputs});
    return m;
  }
  FfnWeights Ffn(const ModelConfig& c, int64_t size) const {
    const int64_t d = c.hidden_size;
    return {Matrix(size, d, c.mlp_bias), Matrix(size, d, c.mlp_bias), Matrix(d, size, c.mlp_bias)};
  }
};

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

Model AllocateModel(const ModelConfig& c, bool shapes_only) {
  const Allocator allocate{shapes_only};
  const double bytes = 4.0 * ParameterCount(c);
  const double memory = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  if (bytes > memory) {
    Fail("config.size", "a model of {:.3g} parameters needs {:.1f} GB, this machine has {:.1f} GB",
         bytes / 4, bytes / 1e9, memory / 1e9);
  }
  Model m;
  m.config = c;
  m.embed = allocate.Weight(c.vocab_size, c.hidden_size);
  m.norm = at::zeros({c.hidden_size});
  m.head.weight = c.tie_word_embeddings ? m.embed : allocate.Weight(c.vocab_size, c.hidden_size);
  const int64_t q_width = c.num_heads * c.head_dim, kv_width = c.num_kv_heads * c.head_dim;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    LayerWeights w;
    w.kv_layout = KvShapeOf(c, l).layout;
    w.sliding_window = SlidingWindow(c, l);
    w.rotates = c.without_rotation.empty() || !c.without_rotation[l];
    if (const int32_t source = WeightsLayer(c, l); source != l) {
      ShareWeights(m.layers[source], &w);
      AddRouters(c, l, &w);
      m.layers.push_back(std::move(w));
      continue;
    }
    w.input_norm = at::zeros({c.hidden_size});
    w.post_norm = at::zeros({c.hidden_size});
    w.q = allocate.Matrix(q_width, c.hidden_size, c.qkv_bias);
    w.k = allocate.Matrix(kv_width, c.hidden_size, c.qkv_bias);
    w.v = allocate.Matrix(kv_width, c.hidden_size, c.qkv_bias);
    w.o = allocate.Matrix(c.hidden_size, q_width, c.o_bias);
    if (c.qk_norm) {
      w.q_norm = at::zeros({c.head_dim});
      w.k_norm = at::zeros({c.head_dim});
    }
    AddRouters(c, l, &w);
    const MlpShape mlp = MlpShapeOf(c, l);
    for (FfnWeights& expert : w.experts) expert = allocate.Ffn(c, mlp.expert_size);
    if (mlp.size > 0) w.ffn = allocate.Ffn(c, mlp.size);
    if (mlp.gated) w.shared_gate = allocate.Matrix(1, c.hidden_size, false);
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

namespace {

/// The matrices of layers and head, but not those of routers.
void ForEachMatrix(Model& model, const std::function<void(ops::Matrix&)>& visit) {
  const auto ffn = [&](FfnWeights& w) {
    for (ops::Matrix* m : {&w.gate, &w.up, &w.down}) visit(*m);
  };
  for (LayerWeights& w : model.layers) {
    for (ops::Matrix* m : {&w.q, &w.k, &w.v, &w.o}) visit(*m);
    ffn(w.ffn);
    for (FfnWeights& expert : w.experts) ffn(expert);
  }
  visit(model.head);
}

}  // namespace

void FillModel(Model& model, const WeightOptions& options, const TensorSource& source) {
  std::map<const at::Tensor*, ops::Matrix*> matrix_of;
  if (options.compact) {
    ForEachMatrix(model, [&](ops::Matrix& m) { matrix_of[&m.weight] = &m; });
    if (model.config.tie_word_embeddings) matrix_of[&model.embed] = &model.head;
  }
  ForEachTensor(model, [&](const std::string& name, at::Tensor& t) {
    const auto found = matrix_of.find(&t);
    ops::Matrix* matrix = found == matrix_of.end() ? nullptr : found->second;
    kernels::PackedMatrix stored;
    if (matrix && source.pack_stored && source.pack_stored(name, &stored)) {
      matrix->Compact(std::move(stored));
    } else if (const auto values = matrix ? source.view(name) : std::span<const float>();
               !values.empty()) {
      // Packing only reads.
      matrix->weight = at::from_blob(const_cast<float*>(values.data()), t.sizes(), at::kFloat);
      matrix->Compact(options.format);
      io::ForgetPages(std::as_bytes(values));
    } else {
      if (t.is_meta()) t = at::empty(t.sizes(), at::kFloat);
      source.read(name, t);
      if (!matrix) return;
      matrix->weight = t;
      matrix->Compact(options.format);
    }
    t = matrix->weight;
  });
}

int64_t WeightBytes(Model& model) {
  int64_t bytes = 0;
  std::set<const void*> seen;
  ForEachMatrix(model, [&](ops::Matrix& m) {
    if (!m.weight.defined() || !m.weight.is_meta()) return;
    if (seen.insert(m.Packed().data()).second) bytes += m.Packed().bytes();
  });
  ForEachTensor(model, [&](const std::string&, at::Tensor& t) {
    if (!t.is_meta()) bytes += static_cast<int64_t>(t.nbytes());
  });
  return bytes;
}

at::Tensor EmbedTokens(const Model& model, const at::Tensor& ids_N) {
  return model.embed.is_meta() ? ops::PackedRows(model.head, ids_N)
                               : ops::Embed(model.embed, ids_N);
}

Model LoadModel(const std::string& dir, const WeightOptions& options) {
  Model model = AllocateModel(LoadConfig(dir), /*shapes_only=*/true);
  const io::ShardedTensors file = io::ShardedTensors::Open(dir);
  std::set<std::string> expected;
  ForEachTensor(model, [&](const std::string& our_name, at::Tensor& t) {
    const std::string name = FileName(model.config, our_name);
    expected.insert(name);
    const io::TensorInfo& info = file.Get(name);
    if (t.sizes() != at::IntArrayRef(info.shape)) {
      Fail("model.load", "{}: {}: config.json asks for shape [{}], the file has [{}]", dir, name,
           fmt::join(t.sizes(), ", "), fmt::join(info.shape, ", "));
    }
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
  const auto read = [&](const std::string& name, at::Tensor& t) {
    file.ReadF32Into(FileName(model.config, name), {ops::F32(t), static_cast<size_t>(t.numel())});
  };
  const auto view = [&](const std::string& name) {
    return file.ViewF32(FileName(model.config, name));
  };
  FillModel(model, options, {read, view, nullptr});
  return model;
}

void SaveModel(Model& model, const std::string& dir) {
  Json config = ConfigToJson(model.config);
  config.erase("dtype");  // the newer name of the same key
  config["torch_dtype"] = "float32";
  io::WriteFile(dir + "/config.json", config.dump(2) + "\n");
  std::vector<io::TensorToWrite> tensors;
  ForEachTensor(model, [&](const std::string& name, at::Tensor& t) {
    tensors.push_back({FileName(model.config, name), io::DType::kF32, t.sizes().vec(),
                       std::as_bytes(std::span(ops::F32(t), static_cast<size_t>(t.numel())))});
  });
  io::WriteSafetensors(dir + "/model.safetensors", tensors);
}

}  // namespace detour::model
