#include "model/cost.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/error.h"
#include "routing/registry.h"

namespace detour::model {

using routing::Site;

namespace {

/// What the routers of one layer are, by site; null where there is none.
struct LayerRouters {
  std::unique_ptr<routing::Router> at[3];
  bool value_bypass = false, write_all = false;
  int64_t experts_per_row = 0;

  LayerRouters(const ModelConfig& c, int32_t l) {
    for (const routing::RoutingConfig& r : c.routing) {
      if (!r.HasLayer(l)) continue;
      for (auto& router : routing::FindMethod(r.method).make(r, RouterShape(c), l)) {
        if (router->site() == Site::kMixer) {
          value_bypass = r.Text("bypass") != "identity";
          write_all = r.Text("kv") == "all";
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
  const int64_t attention = 2 * d * (c.num_heads + c.num_kv_heads) * c.head_dim;
  int64_t layers = 0, mlps = 0;
  for (int32_t l = 0; l < c.num_layers; ++l) {
    if (WeightsLayer(c, l) != l) continue;
    ++layers;
    const LayerRouters routers(c, l);
    const int64_t experts = routers[Site::kFfn] ? routers[Site::kFfn]->num_experts() : 0;
    mlps += experts + (experts == 0 || HasSharedExpert(c, l));
  }
  const int64_t embeddings = (c.tie_word_embeddings ? 1 : 2) * c.vocab_size * d;
  return embeddings + layers * (attention + 2 * d) + mlps * 3 * d * c.intermediate_size + d +
         RouterParameterCount(c);
}

void LayerRows::Add(const LayerRows& other) {
  entered += other.entered;
  attended += other.attended;
  visited += other.visited;
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
    if (mixer.write_all && !mixer.all_routed) {
      const at::Tensor all = at::arange(entered.num_rows(), at::kInt);
      for (const ops::Prefix& p : Prefixes(entered, mixer.rows_R, all)) {
        r.visited += static_cast<double>(p.end - p.begin);
      }
    } else {
      for (const ops::RoutedSegment& s : RoutedSegments(entered, mixer)) {
        const auto n = static_cast<double>(s.end - s.begin);
        r.visited += n * (n + 1) / 2;
      }
    }
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
    r.attended = within(Site::kMixer, r.entered);
    // With every key written, rows spread evenly see half of them on average.
    r.visited = r.attended * ((routers.write_all ? r.entered : r.attended) + 1) / 2;
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
    f.scores += 4 * q_width * (counting == Counting::kCausal ? rows[l].visited : r * written);
    const double shared = routers.experts_per_row > 0 && HasSharedExpert(c, l) ? in : 0;
    f.mlp += 6 * d * c.intermediate_size * (fed + shared);
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
    if (!routers.write_all) entries *= routers.Share(Site::kMixer, share);
    const bool ragged = routers[Site::kLayer] || routers[Site::kMixer];
    bytes += entries * (entry + (ragged ? 4 : 0));
  }
  return bytes;
}

}  // namespace detour::model
