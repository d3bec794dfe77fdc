// Gates with a straight-through gradient, against a composition of torch operations in f64 that
// computes both ways of every row and weights every key with its gate.
#include "model/counterfactual.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/rng.h"
#include "ops/rows.h"
#include "routing/registry.h"

namespace detour::model {
namespace {

using routing::Bypass;
using routing::Plan;
using routing::Site;

constexpr int64_t kHeads = 4, kKvHeads = 2, kHeadDim = 8;

struct Case {
  std::string name;
  Site site = Site::kMixer;
  Bypass bypass = Bypass::kIdentity;
  bool keys = false, write_all = false;
  double share = 0.4;  // of rows that take the span
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

Model OneLayer() {
  Model m = AllocateModel(ParseConfig({{"vocab_size", 31},
                                       {"hidden_size", 24},
                                       {"intermediate_size", 40},
                                       {"num_hidden_layers", 1},
                                       {"num_attention_heads", kHeads},
                                       {"num_key_value_heads", kKvHeads},
                                       {"head_dim", kHeadDim},
                                       {"initializer_range", 0.3}},
                                      "test"));
  InitializeWeights(m, 4);
  return m;
}

at::Tensor Double(const at::Tensor& t) { return t.detach().to(at::kDouble); }

at::Tensor Norm(const at::Tensor& x, const at::Tensor& w, double eps) {
  return x * (x.square().mean(-1, true) + eps).rsqrt() * w;
}

at::Tensor Rotate(const at::Tensor& x, int64_t heads, const at::Tensor& positions) {
  const at::Tensor i = at::arange(kHeadDim / 2, at::kDouble);
  const at::Tensor angle =
      positions.to(at::kDouble).unsqueeze(1) * at::pow(10000.0, -2.0 * i / kHeadDim).unsqueeze(0);
  const at::Tensor c = angle.cos().unsqueeze(1), s = angle.sin().unsqueeze(1);
  const at::Tensor y = x.view({x.size(0), heads, kHeadDim});
  const at::Tensor a = y.slice(2, 0, kHeadDim / 2), b = y.slice(2, kHeadDim / 2);
  return at::cat({a * c - b * s, b * c + a * s}, 2);
}

/// Everything in f64, dense, one document after the other.
struct Oracle {
  const LayerWeights& w;
  const routing::Stream& stream;
  double eps;

  /// [N, D]: W_O of attention; entry j counts g_j times for other rows, and once for its own row if
  /// that takes the span. Without keys the weights are constants.
  at::Tensor Attend(const at::Tensor& x, const at::Tensor& g, bool keys, bool write_all) const {
    const int64_t n = x.size(0), group = kHeads / kKvHeads;
    const at::Tensor h = Norm(x, Double(w.input_norm), eps);
    const at::Tensor q = Rotate(h.mm(Double(w.q.weight).t()), kHeads, stream.positions_N);
    const at::Tensor k = Rotate(h.mm(Double(w.k.weight).t()), kKvHeads, stream.positions_N)
                             .repeat_interleave(group, 1);
    const at::Tensor v =
        h.mm(Double(w.v.weight).t()).view({n, kKvHeads, kHeadDim}).repeat_interleave(group, 1);
    at::Tensor document = at::empty({n}, at::kLong);
    for (size_t s = 0; s < stream.segments.size(); ++s) {
      document.slice(0, stream.segments[s].begin, stream.segments[s].end)
          .fill_(static_cast<int64_t>(s));
    }
    const at::Tensor i = at::arange(n);
    const at::Tensor visible =
        (i.unsqueeze(0) <= i.unsqueeze(1)) & (document.unsqueeze(0) == document.unsqueeze(1));
    const at::Tensor own = at::eye(n, at::kDouble);
    const at::Tensor weight = write_all ? at::ones({n, n}, at::kDouble)
                                        : (keys ? g : g.detach()).unsqueeze(0) * (1 - own) +
                                              own * g.detach().unsqueeze(1);
    const at::Tensor e =
        (at::einsum("ihd,jhd->hij", {q, k}) / std::sqrt(double{kHeadDim})).exp() * visible * weight;
    const at::Tensor p = e / e.sum(-1, true).clamp_min(1e-300);
    return at::einsum("hij,jhd->ihd", {p, v}).reshape({n, -1}).mm(Double(w.o.weight).t());
  }
  at::Tensor Value(const at::Tensor& x) const {
    const at::Tensor h = Norm(x, Double(w.input_norm), eps);
    return h.mm(Double(w.v.weight).t())
        .view({x.size(0), kKvHeads, kHeadDim})
        .repeat_interleave(kHeads / kKvHeads, 1)
        .reshape({x.size(0), -1})
        .mm(Double(w.o.weight).t());
  }
  at::Tensor Mlp(const at::Tensor& x) const {
    const at::Tensor h = Norm(x, Double(w.post_norm), eps);
    return (at::silu(h.mm(Double(w.ffn.gate.weight).t())) * h.mm(Double(w.ffn.up.weight).t()))
        .mm(Double(w.ffn.down.weight).t());
  }
  at::Tensor Answer(const Case& c, const at::Tensor& x, const at::Tensor& gate) const {
    const at::Tensor g = gate.unsqueeze(1);
    if (c.site == Site::kFfn) return x + g * Mlp(x);
    const at::Tensor a = Attend(x, gate, c.keys, c.write_all);
    if (c.site == Site::kLayer) return x + g * (a + Mlp(x + a));
    return x + g * a + (c.bypass == Bypass::kValue ? (1 - g) * Value(x) : at::zeros_like(x));
  }
};

class StraightThrough : public testing::TestWithParam<Case> {};

TEST_P(StraightThrough, GradientsAreThoseOfBothWays) {
  const Case& c = GetParam();
  const Model m = OneLayer();
  const auto stream =
      routing::Stream::FromSegments({{0, 0, 19, 0}, {1, 19, 20, 0}, {2, 20, 33, 0}});
  const int64_t n = stream.num_rows();
  const Rng rng(8, RngPurpose::kTest);
  std::vector<float> values(n * 24), probe(n * 24);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(rng.Normal(i));
    probe[i] = static_cast<float>(rng.Normal(100000 + i));
  }
  std::vector<uint8_t> flags(n);
  for (int64_t i = 0; i < n; ++i) flags[i] = rng.Uniform(200000 + i) < c.share;
  at::Tensor x = at::tensor(values).view({n, 24}).requires_grad_();
  const at::Tensor r = at::tensor(probe).view({n, 24});
  Plan plan{.bypass = c.bypass, .write_all = c.write_all};
  SetRows(flags, &plan);
  at::Tensor gate = at::empty({n}, at::kFloat);
  for (int64_t i = 0; i < n; ++i) ops::F32(gate)[i] = flags[i];
  plan.gate_N = gate.requires_grad_();
  plan.counterfactual = true;
  plan.key_gradient = c.keys;
  routing::LayerPlans taken;
  const at::Tensor y = RunLayer(
      m, m.layers[0], x, stream,
      [&](Site site, const routing::Taps&) { return site == c.site ? plan : Plan{}; }, nullptr,
      &taken);

  at::Tensor x64 = Double(x).requires_grad_(), gate64 = Double(gate).requires_grad_();
  const Oracle oracle{m.layers[0], stream, m.config.rms_norm_eps};
  at::Tensor expected = oracle.Answer(c, x64, gate64);
  if (c.site == Site::kMixer) expected = expected + oracle.Mlp(expected);
  if (c.site == Site::kFfn) {
    const at::Tensor ones = at::ones({n}, at::kDouble);
    expected = oracle.Answer(c, x64 + oracle.Attend(x64, ones, false, false), gate64);
  }
  const auto relative = [](const at::Tensor& a, const at::Tensor& b) {
    return ((a - b).abs().max() / b.abs().max()).item<double>();
  };
  EXPECT_LE(relative(Double(y), expected), 1e-5);
  (y * r).sum().backward();
  (expected * Double(r)).sum().backward();
  EXPECT_LE(relative(Double(x.grad()), x64.grad()), 1e-4);
  EXPECT_LE(relative(Double(gate.grad()), gate64.grad()), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(
    All, StraightThrough,
    testing::Values(Case{"mixer_identity"}, Case{"mixer_value", Site::kMixer, Bypass::kValue},
                    Case{"mixer_value_keys", Site::kMixer, Bypass::kValue, true},
                    Case{"mixer_identity_keys", Site::kMixer, Bypass::kIdentity, true},
                    Case{"mixer_all_keys_visible", Site::kMixer, Bypass::kIdentity, false, true},
                    Case{"ffn", Site::kFfn},
                    Case{"mixer_all", Site::kMixer, Bypass::kValue, true, false, 1.0},
                    Case{"mixer_none", Site::kMixer, Bypass::kValue, true, false, 0.0},
                    Case{"layer_all", Site::kLayer, Bypass::kIdentity, true, false, 1.0},
                    Case{"layer_none", Site::kLayer, Bypass::kIdentity, true, false, 0.0},
                    Case{"layer", Site::kLayer},
                    Case{"layer_keys", Site::kLayer, Bypass::kIdentity, true}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace detour::model
