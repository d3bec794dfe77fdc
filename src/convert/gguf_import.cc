#include "convert/gguf_import.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <set>

#include "convert/gguf_layout.h"
#include "core/error.h"
#include "kernels/kernels.h"

namespace detour::convert {
namespace {

constexpr const char* kRopeFactors = "rope_freqs.weight";

// Keys behind "ARCHITECTURE.". Those that are not read below say nothing that is computed.
constexpr std::string_view kKnownKeys[] = {"attention.head_count",
                                           "attention.head_count_kv",
                                           "attention.key_length",
                                           "attention.layer_norm_rms_epsilon",
                                           "attention.sliding_window",
                                           "attention.value_length",
                                           "block_count",
                                           "context_length",
                                           "embedding_length",
                                           "expert_count",
                                           "expert_used_count",
                                           "feed_forward_length",
                                           "rope.dimension_count",
                                           "rope.freq_base",
                                           "rope.scale_linear",
                                           "rope.scaling.attn_factor",
                                           "rope.scaling.factor",
                                           "rope.scaling.finetuned",
                                           "rope.scaling.original_context_length",
                                           "rope.scaling.type",
                                           "rope.scaling.yarn_beta_fast",
                                           "rope.scaling.yarn_beta_slow",
                                           "tensor_data_layout",
                                           "use_parallel_residual",
                                           "vocab_size"};

/// Reads the keys of one architecture.
class Reader {
 public:
  explicit Reader(const io::GgufFile& file) : file_(file) {
    const std::string name = file.GetString("general.architecture");
    architecture_ = FindArchitecture(name);
    if (!architecture_) {
      Bad("general.architecture: expected one of {}, got \"{}\"", KnownArchitectures(),
          Printable(name));
    }
    prefix_ = name + ".";
    if (file.HasKey("split.count") && file.GetInt("split.count") > 1) {
      Bad("one of {} parts of a model. Hint: join them with llama.cpp's gguf-split --merge",
          file.GetInt("split.count"));
    }
    for (const auto& [key, value] : file.metadata()) {
      const std::string_view all = key;
      if (!all.starts_with(prefix_)) continue;
      const std::string_view known = all.substr(prefix_.size());
      if (std::find(std::begin(kKnownKeys), std::end(kKnownKeys), known) == std::end(kKnownKeys)) {
        Bad("{}: no such key is known, and a model with it may compute something else",
            Printable(key));
      }
    }
  }

  Json Read() {
    RefuseWhatIsNotComputed();
    const io::GgufTensor& embedding = file_.Get("token_embd.weight");
    if (embedding.shape.size() != 2) {
      Bad("token_embd.weight: expected 2 dims, got [{}]", fmt::join(embedding.shape, ", "));
    }
    const int64_t vocab_size = Int("vocab_size", 1, 1 << 24, embedding.shape[0]);
    const int64_t num_heads = Int("attention.head_count", 1, 4096);
    const int64_t hidden_size = Int("embedding_length", 1, 1 << 17);
    Json json = {{"model_type", architecture_->name},
                 {"vocab_size", vocab_size},
                 {"hidden_size", hidden_size},
                 {"intermediate_size", Int("feed_forward_length", 1, 1 << 19)},
                 {"num_hidden_layers", Int("block_count", 1, 1024)},
                 {"num_attention_heads", num_heads},
                 {"num_key_value_heads", Int("attention.head_count_kv", 1, num_heads, num_heads)},
                 {"head_dim", HeadDim(hidden_size, num_heads)},
                 {"max_position_embeddings", Int("context_length", 1, 1 << 26)},
                 {"rms_norm_eps", Double("attention.layer_norm_rms_epsilon")},
                 {"rope_theta", Double("rope.freq_base", 1e4)},
                 {"tie_word_embeddings", !file_.Has("output.weight")}};
    if (architecture_->pairs_rotate) {  // qwen's biases follow from its name
      json["attention_bias"] = file_.Has("blk.0.attn_q.bias");
      json["mlp_bias"] = file_.Has("blk.0.ffn_gate.bias");
    }
    ReadScaling(&json);
    for (const auto& [theirs, ours] :
         {std::pair("bos_token_id", "bos_token_id"), std::pair("eos_token_id", "eos_token_id"),
          std::pair("padding_token_id", "pad_token_id")}) {
      const std::string key = std::string("tokenizer.ggml.") + theirs;
      if (file_.HasKey(key)) json[ours] = file_.GetInt(key, 0, vocab_size - 1);
    }
    return json;
  }

 private:
  template <typename... Args>
  [[noreturn]] void Bad(fmt::format_string<Args...> format, Args&&... args) const {
    Fail("convert.gguf", "{}: {}", file_.path(), fmt::format(format, std::forward<Args>(args)...));
  }
  std::string Key(const char* name) const { return prefix_ + name; }
  bool Has(const char* name) const { return file_.HasKey(Key(name)); }

  /// A number, or a list with one equal number a layer.
  int64_t Int(const char* name, int64_t min, int64_t max, int64_t fallback = -1) const {
    const std::string key = Key(name);
    if (!file_.HasKey(key) && fallback >= 0) return fallback;
    if (!file_.HasKey(key) || file_.metadata().find(key)->second.kind() != io::GgufKind::kArray) {
      return file_.GetInt(key, min, max);
    }
    const std::vector<int64_t> values = file_.GetInts(key);
    for (const int64_t value : values) {
      if (value != values[0])
        Bad("{}: layers of different widths ({} and {})", key, values[0], value);
    }
    if (values.empty() || values[0] < min || values[0] > max) {
      Bad("{}: expected a value in [{}, {}], got {}", key, min, max,
          values.empty() ? "none" : std::to_string(values[0]));
    }
    return values[0];
  }

  /// Files hold f32; the shortest decimal of it is what the model's author wrote (1e-5, not
  /// 9.999999747378752e-06).
  double Double(const char* name, double fallback = NAN) const {
    const std::string key = Key(name);
    if (!file_.HasKey(key) && !std::isnan(fallback)) return fallback;
    const double value = file_.GetDouble(key);
    if (!std::isfinite(value)) Bad("{}: expected a finite number, got {}", key, value);
    if (file_.metadata().find(key)->second.kind() != io::GgufKind::kF32) return value;
    return std::strtod(fmt::format("{}", static_cast<float>(value)).c_str(), nullptr);
  }

  int64_t HeadDim(int64_t hidden_size, int64_t num_heads) const {
    if (!Has("attention.key_length") && !Has("rope.dimension_count") &&
        hidden_size % num_heads != 0) {
      Bad("{} {} is no multiple of {} {}, and {} is not there", Key("embedding_length"),
          hidden_size, Key("attention.head_count"), num_heads, Key("attention.key_length"));
    }
    const int64_t width =
        Int("attention.key_length", 2, kernels::kMaxHeadDim,
            hidden_size % num_heads == 0 ? hidden_size / num_heads
                                         : Int("rope.dimension_count", 2, kernels::kMaxHeadDim));
    for (const char* name : {"attention.value_length", "rope.dimension_count"}) {
      if (const int64_t other = Int(name, 1, 1 << 20, width); other != width) {
        Bad("{}: expected the width of a head, {}, got {}", Key(name), width, other);
      }
    }
    return width;
  }

  void RefuseWhatIsNotComputed() const {
    if (Int("expert_count", 0, 1 << 20, 0) > 0) {
      Bad("{}: experts are read from Hugging Face directories only", Key("expert_count"));
    }
    if (Has("attention.sliding_window") &&
        Int("attention.sliding_window", 0, int64_t{1} << 40) > 0 &&
        Int("attention.sliding_window", 0, int64_t{1} << 40) < Int("context_length", 1, 1 << 26)) {
      Bad("{}: a window is read from Hugging Face directories only",
          Key("attention.sliding_window"));
    }
    if (Has("use_parallel_residual") && file_.GetBool(Key("use_parallel_residual"))) {
      Bad("{}: expected false", Key("use_parallel_residual"));
    }
    const std::string layout = file_.GetStringOr(Key("tensor_data_layout"), "Meta AI original pth");
    if (layout != "Meta AI original pth") {
      Bad("{}: unknown \"{}\"", Key("tensor_data_layout"), Printable(layout));
    }
  }

  void ReadScaling(Json* json) const {
    const std::string type =
        file_.GetStringOr(Key("rope.scaling.type"), Has("rope.scale_linear") ? "linear" : "none");
    Json scaling;
    if (type == "linear") {
      scaling = {{"rope_type", "linear"},
                 {"factor",
                  Double(Has("rope.scale_linear") ? "rope.scale_linear" : "rope.scaling.factor")}};
    } else if (type == "yarn") {
      scaling = {{"rope_type", "yarn"},
                 {"factor", Double("rope.scaling.factor")},
                 {"original_max_position_embeddings",
                  Int("rope.scaling.original_context_length", 1, 1 << 26)},
                 {"beta_fast", Double("rope.scaling.yarn_beta_fast", 32)},
                 {"beta_slow", Double("rope.scaling.yarn_beta_slow", 1)}};
      if (Double("rope.scaling.attn_factor", 1) != 1) {
        Bad("{}: expected 1", Key("rope.scaling.attn_factor"));
      }
    } else if (type != "none") {
      Bad("{}: expected none, linear or yarn, got \"{}\"", Key("rope.scaling.type"),
          Printable(type));
    }
    if (file_.Has(kRopeFactors)) {
      if (!scaling.is_null()) Bad("{} and {} \"{}\"", kRopeFactors, Key("rope.scaling.type"), type);
      scaling = ScalingOfFactors(*json);
    }
    if (!scaling.is_null()) (*json)["rope_scaling"] = scaling;
  }

  /// The file holds what Llama 3's rule made of its numbers, not the numbers.
  Json ScalingOfFactors(const Json& json) const {
    const int64_t half = json["head_dim"].get<int64_t>() / 2;
    const std::vector<float> factors = file_.ReadF32(kRopeFactors, std::array{half});
    if (std::all_of(factors.begin(), factors.end(), [](float f) { return f == 1; })) return {};
    const double largest = *std::max_element(factors.begin(), factors.end());
    const Json scaling = {{"rope_type", "llama3"},
                          {"factor", largest},
                          {"low_freq_factor", 1.0},
                          {"high_freq_factor", 4.0},
                          {"original_max_position_embeddings",
                           Int("rope.scaling.original_context_length", 1, 1 << 26, 8192)}};
    bool equal = largest >= 1;
    if (equal) {
      Json scaled = json;
      scaled["rope_scaling"] = scaling;
      const std::vector<float> expected = RopeFactors(model::ParseConfig(scaled, file_.path()));
      for (int64_t i = 0; i < half; ++i) {
        equal = equal && std::abs(factors[i] - expected[i]) <= 1e-5 * expected[i];
      }
    }
    if (!equal) {
      Bad("{}: these factors are not what Llama 3's scaling of 8,192 positions gives (up to "
          "{:.4g})",
          kRopeFactors, largest);
    }
    return scaling;
  }

  const io::GgufFile& file_;
  const GgufArchitecture* architecture_ = nullptr;
  std::string prefix_;
};

void CheckTensors(model::Model& model, const io::GgufFile& file) {
  std::set<std::string> expected = {kRopeFactors};
  ForEachTensor(model, [&](const std::string& our_name, at::Tensor& t) {
    const std::string name = GgufName(our_name);
    expected.insert(name);
    const io::GgufTensor& tensor = file.Get(name);
    if (t.sizes() != at::IntArrayRef(tensor.shape)) {
      Fail("convert.gguf", "{}: {}: the metadata ask for shape [{}], the tensor has [{}]",
           file.path(), name, fmt::join(t.sizes(), ", "), fmt::join(tensor.shape, ", "));
    }
  });
  for (const auto& [name, tensor] : file.tensors()) {
    if (!expected.count(name)) {
      Fail("convert.gguf", "{}: unexpected tensor {}: the metadata describe no such weight",
           file.path(), Printable(name));
    }
  }
}

/// Packs a matrix of Q8_0, Q4_0 or Q4_1 as it is; rows of heads of `head_rows` are reordered.
/// False for other types.
bool PackStored(const io::GgufTensor& tensor, int64_t head_rows, kernels::PackedMatrix* packed) {
  using kernels::QuantBlock, kernels::WeightFormat, kernels::kQuantBlock;
  const bool q8 = tensor.type == io::GgufType::kQ8_0, min = tensor.type == io::GgufType::kQ4_1;
  if (tensor.shape.size() != 2 || !(q8 || min || tensor.type == io::GgufType::kQ4_0)) return false;
  const int64_t head_bytes = min ? 4 : 2, block_bytes = head_bytes + (q8 ? 32 : 16);
  const int64_t num_blocks = tensor.shape[1] / kQuantBlock;
  const auto blocks_of = [&](int64_t m, QuantBlock* row) {
    const int64_t from = head_rows > 0 ? FileRow(m, head_rows) : m;
    const std::byte* p = tensor.bytes.data() + from * num_blocks * block_bytes;
    for (int64_t b = 0; b < num_blocks; ++b, p += block_bytes) {
      std::memcpy(&row[b].scale, p, 2);
      if (min) std::memcpy(&row[b].min, p + 2, 2);
      for (int i = 0; i < kQuantBlock; ++i) {
        const auto byte = static_cast<uint8_t>(p[head_bytes + (q8 ? i : i % 16)]);
        row[b].q[i] = static_cast<int8_t>(q8 ? byte : i < 16 ? byte & 15 : byte >> 4);
      }
    }
  };
  packed->PackBlocks(q8    ? WeightFormat::kQ8
                     : min ? WeightFormat::kQ4Min
                           : WeightFormat::kQ4,
                     tensor.shape[0], tensor.shape[1], blocks_of);
  return true;
}

}  // namespace

model::ModelConfig ConfigFromGguf(const io::GgufFile& file) {
  return model::ParseConfig(Reader(file).Read(), file.path());
}

model::Model ModelFromGguf(const io::GgufFile& file, const model::WeightOptions& options) {
  model::Model model = model::AllocateModel(ConfigFromGguf(file), /*shapes_only=*/true);
  CheckTensors(model, file);
  const bool reordered = FindArchitecture(model.config.model_type)->pairs_rotate;
  const auto heads_of = [&](const std::string& name) {
    return reordered ? ReorderedHeads(model.config, name) : 0;
  };
  const auto read = [&](const std::string& name, at::Tensor& t) {
    const std::span<float> values(t.mutable_data_ptr<float>(), static_cast<size_t>(t.numel()));
    file.ReadF32Into(GgufName(name), values);
    if (heads_of(name) > 0) ReorderToOurs(values, heads_of(name), model.config.head_dim);
  };
  const auto view = [&](const std::string& name) {
    return heads_of(name) > 0 ? std::span<const float>() : file.ViewF32(GgufName(name));
  };
  const auto pack = [&](const std::string& name, kernels::PackedMatrix* packed) {
    return PackStored(file.Get(GgufName(name)), heads_of(name) > 0 ? model.config.head_dim : 0,
                      packed);
  };
  model::TensorSource source{read, view, nullptr};
  if (options.as_stored) source.pack_stored = pack;
  FillModel(model, options, source);
  return model;
}

}  // namespace detour::convert
