#include "model/cost.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/error.h"
#include "model/model.h"
#include "routing/registry.h"

namespace detour::model {

using routing::Site;

namespace {

/// What the routers of one layer are, by site; null where there is none.
struct LayerRouters {
  std::unique_ptr<routing::Router> at[3];
  bool value_bypass = false, write_all = false;
  int64_t experts_per_row = 0;
  ops::WindowRule window;
  ops::BlockRule blocks;

  LayerRouters(const ModelConfig& c, int32_t l) : window(KvShapeOf(c, l).window) {
    for (const routing::RoutingConfig& r : c.routing) {
      if (!r.HasLayer(l)) continue;
      for (auto& router : routing::FindMethod(r.method).make(r, RouterShape(c), l)) {
        if (router->site() == Site::kMixer) {
          value_bypass = r.TextOr("bypass", "identity") != "identity";
          write_all = r.TextOr("kv", "") == "all";
          blocks = router->blocks();
        }
        if (router->num_experts() > 0) experts_per_row = r.Int("top_k");
        const auto site = static_cast<size_t>(router->site());
        at[site] = std::move(router);
      }
    }
  }
  /// What the router of a site lets in, where gates let in `share`.
  double Share(Site site, double share) const {
    return (*this)[site] ? (*this)[site]->ServingShare(share) : 1;
  }
  const routing::Router* operator[](Site site) const { return at[static_cast<size_t>(site)].get(); }
  int64_t FlopsPerRow(Site site) const { return (*this)[site] ? (*this)[site]->FlopsPerRow() : 0; }
};

double RowsIn(const routing::Plan& plan, double num_rows) {
  return plan.decided() ? static_cast<double>(plan.NumRouted()) : num_rows;
}

/// Adds what row `entry` of a document does among blocks.
void AddBlockRow(const ops::BlockRule& rule, int64_t entry, LayerRows* rows) {
  const bool chooses = entry / rule.size >= rule.top;
  rows->visited +=
      static_cast<double>(chooses ? (rule.top - 1) * rule.size + entry % rule.size + 1 : entry + 1);
  if (chooses && !rule.random) rows->scored += static_cast<double>(entry / rule.size);
}

/// Keys that the rows of a document of n rows see in a window, if `share` of them, evenly spread,
/// stay and see far.
double VisitedInWindow(const ops::WindowRule& rule, int64_t n, double share) {
  double visited = 0;
  for (int64_t p = 0; p < n; ++p) {
    const auto behind = static_cast<double>(std::max<int64_t>(0, p + 1 - rule.size));
    const double sink = std::min(static_cast<double>(rule.sink), behind);
    visited += static_cast<double>(p + 1) - behind + sink + share * share * (behind - sink);
  }
  return visited;
}

/// Keys that the rows of `stream` visit under a mixer's plan.
void CountVisited(const routing::Stream& stream, const routing::Plan& mixer, int64_t sliding_window,
                  LayerRows* r) {
  if (sliding_window > 0) {
    for (const routing::Segment& s : stream.segments) {
      for (int64_t n = 1; n <= s.end - s.begin; ++n) {
        r->visited += static_cast<double>(std::min(n, sliding_window));
      }
    }
  } else if (mixer.bypass == routing::Bypass::kWindow) {
    r->attended = r->entered;
    ops::AttendShape shape{.positions_W = stream.positions_N};
    shape.segments = RoutedSegments(stream, routing::Plan{});
    r->visited += static_cast<double>(VisitedInWindow(shape, WindowRowsOf(stream, mixer)));
  } else if (mixer.blocks.size > 0) {
    for (const routing::Segment& s : stream.segments) {
      for (int64_t e = 0; e < s.end - s.begin; ++e) AddBlockRow(mixer.blocks, e, r);
    }
  } else if (mixer.write_all && !mixer.all_routed) {
    const at::Tensor all = at::arange(stream.num_rows(), at::kInt);
    for (const ops::Prefix& p : Prefixes(stream, mixer.rows_R, all)) {
      r->visited += static_cast<double>(p.end - p.begin);
    }
  } else {
    for (const ops::RoutedSegment& s : RoutedSegments(stream, mixer)) {
      const auto n = static_cast<double>(s.end - s.begin);
      r->visited += n * (n + 1) / 2;
    }
  }
}

}  // namespace

int64_t RouterParameterCount(const ModelConfig& c) {
  int64_t count = 0;
  for (int32_t l : RoutedLayers(c)) {
    for (const auto& router : LayerRouters(c, l).at) {
      if (!router) continue;
      router->ForEachTensor([&](const std::string&, at::Tensor& t) { count += t.numel(); });
    }
  }
  return count;
}

int64_t ParameterCount(const ModelConfig& c) {
  const int64_t d = c.hidden_size;
  const int64_t heads = c.num_heads + 2 * c.num_kv_heads;
  const int64_t attention = 2 * d * (c.num_heads + c.num_kv_heads) * c.head_dim +
                            (c.qkv_bias ? heads * c.head_dim : 0) + (c.o_bias ? d : 0) +
                            (c.qk_norm ? 2 * c.head_dim : 0);
  const auto mlp = [&](int64_t size) { return 3 * d * size + (c.mlp_bias ? 2 * size + d : 0); };
  int64_t layers = 0, mlps = 0;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    if (WeightsLayer(c, l) != l) continue;
    ++layers;
    const MlpShape shape = MlpShapeOf(c, l);
    mlps += shape.num_experts * mlp(shape.expert_size) + (shape.size > 0 ? mlp(shape.size) : 0) +
            (shape.gated ? d : 0);
  }
  const int64_t embeddings = (c.tie_word_embeddings ? 1 : 2) * c.vocab_size * d;
  return embeddings + layers * (attention + 2 * d) + mlps + d + RouterParameterCount(c);
}

void LayerRows::Add(const LayerRows& other) {
  entered += other.entered;
  attended += other.attended;
  visited += other.visited;
  scored += other.scored;
  fed += other.fed;
}

std::vector<LayerRows> RowsOf(const ModelConfig& c, const routing::Stream& stream,
                              const std::vector<routing::LayerPlans>& plans) {
  std::vector<LayerRows> rows;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    const auto& [layer, mixer, ffn] = plans[l];
    const routing::Stream entered = layer.narrows() ? stream.Select(layer.rows_R) : stream;
    LayerRows r;
    r.entered = static_cast<double>(entered.num_rows());
    r.attended = RowsIn(mixer, r.entered);
    r.fed = RowsIn(ffn, r.entered);
    if (!ffn.experts.empty()) r.fed = 0;
    for (const routing::ExpertRows& e : ffn.experts) r.fed += static_cast<double>(e.rows.size(0));
    CountVisited(entered, mixer, SlidingWindow(c, l), &r);
    rows.push_back(r);
  }
  return rows;
}

std::vector<LayerRows> RowsAtShare(const ModelConfig& c, int64_t num_tokens, double share) {
  std::vector<LayerRows> rows;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    const LayerRouters routers(c, l);
    const auto within = [&](Site site, double n) {
      return static_cast<double>(std::llround(routers.Share(site, share) * n));
    };
    LayerRows r;
    r.entered = within(Site::kLayer, static_cast<double>(num_tokens));
    if (routers.window.size > 0) {
      r.attended = r.entered;
      r.visited = VisitedInWindow(routers.window, std::llround(r.entered),
                                  SlidingWindow(c, l) > 0 ? 0 : share);
    } else if (routers.blocks.size > 0) {
      r.attended = r.entered;
      for (int64_t e = 0; e < std::llround(r.entered); ++e) AddBlockRow(routers.blocks, e, &r);
    } else {
      r.attended = within(Site::kMixer, r.entered);
      // With every key written, rows spread evenly see half of them on average.
      r.visited = r.attended * ((routers.write_all ? r.entered : r.attended) + 1) / 2;
    }
    r.fed = routers.experts_per_row > 0 ? r.entered * static_cast<double>(routers.experts_per_row)
                                        : within(Site::kFfn, r.entered);
    rows.push_back(r);
  }
  return rows;
}

Flops ForwardFlops(const ModelConfig& c, int64_t num_tokens, const std::vector<LayerRows>& rows,
                   Counting counting) {
  const double d = c.hidden_size, n = num_tokens;
  const double q_width = c.num_heads * c.head_dim, kv_width = c.num_kv_heads * c.head_dim;
  Flops f;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    const LayerRouters routers(c, l);
    const double in = rows[l].entered, r = rows[l].attended, fed = rows[l].fed;
    const double written = routers.write_all ? in : r;
    // V and O serve both ways if the bypass is the value; Q only rows that attend.
    const double v = routers.value_bypass ? in : written, o = routers.value_bypass ? in : r;
    f.projections += 2 * d * (r * q_width + written * kv_width + v * kv_width + o * q_width);
    const bool sparse = routers.window.size > 0 || routers.blocks.size > 0;
    const bool visited = counting == Counting::kCausal || sparse;
    f.scores += 4 * q_width * (visited ? rows[l].visited : r * written);
    f.scores += 2 * q_width * rows[l].scored;
    const MlpShape mlp = MlpShapeOf(c, l);
    const auto size = static_cast<double>(mlp.size);
    f.mlp += mlp.num_experts > 0
                 ? 6 * d * (fed * static_cast<double>(mlp.expert_size) + in * size) +
                       (mlp.gated ? 2 * d * in : 0)
                 : 6 * d * fed * size;
    f.router +=
        static_cast<double>(routers.FlopsPerRow(Site::kLayer)) * n +
        static_cast<double>(routers.FlopsPerRow(Site::kMixer) + routers.FlopsPerRow(Site::kFfn)) *
            in;
  }
  f.head = 2 * d * c.vocab_size * n;
  return f;
}

Flops ForwardFlops(const ModelConfig& c, int64_t num_tokens, double share, Counting counting) {
  return ForwardFlops(c, num_tokens, RowsAtShare(c, num_tokens, share), counting);
}

ModelConfig MatchFlops(const ModelConfig& c, int64_t num_tokens, double share) {
  const double target = ForwardFlops(c, num_tokens, share, Counting::kCausal).Total();
  ModelConfig twin = DenseTwin(c), best;
  const auto total = [&] { return ForwardFlops(twin, num_tokens, 1.0, Counting::kCausal).Total(); };
  double least = 0;
  for (int32_t layers = 1; layers <= 4 * c.num_layers; ++layers) {
    twin.num_layers = layers;
    twin.intermediate_size = c.intermediate_size;
    const double per_f = 6.0 * static_cast<double>(c.hidden_size * num_tokens) * layers;
    const double f = static_cast<double>(c.intermediate_size) + (target - total()) / per_f;
    if (f < 1) break;
    twin.intermediate_size = std::llround(f);
    const double change = std::abs(std::log(f / static_cast<double>(c.intermediate_size)));
    if (best.num_layers == 0 || change < least) {
      best = twin;
      least = change;
    }
  }
  twin = best;
  if (best.num_layers == 0 || std::abs(total() / target - 1) > 0.005) {
    Fail("info.match", "no dense model of this width has the FLOPs of {} at length {} within 0.5 %",
         MethodName(c), num_tokens);
  }
  return best;
}

double KvBytes(const ModelConfig& c, int64_t num_tokens, double share) {
  const double entry = 2.0 * c.num_kv_heads * c.head_dim * 4;
  double bytes = 0;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    const LayerRouters routers(c, l);
    double entries = static_cast<double>(num_tokens) * routers.Share(Site::kLayer, share);
    const double inner = routers.Share(Site::kMixer, share);
    const double window = static_cast<double>(routers.window.size);
    const double sink = std::min(static_cast<double>(routers.window.sink), entries);
    if (SlidingWindow(c, l) > 0) {
      entries = std::min(entries, window);
    } else if (routers[Site::kMixer] && window > 0) {
      entries = inner * (entries - sink) + sink + std::min(entries, window);
    } else if (routers[Site::kMixer] && !routers.write_all && routers.blocks.size == 0) {
      entries *= inner;
    }
    const kernels::KvLayout layout = KvShapeOf(c, l).layout;
    const double sums = layout.block_pages > 0 ? entry / 2 / kernels::kPageEntries : 0;
    bytes += entries * (entry + sums + (layout.with_positions ? 4 : 0));
  }
  return bytes;
}

}  // namespace detour::model
