#include "infer/score.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/error.h"
#include "infer/ragged_cache.h"
#include "ops/rows.h"

namespace detour::infer {

ScoreMode ParseScoreMode(const std::string& name) {
  if (name == "full") return ScoreMode::kFull;
  if (name == "incremental") return ScoreMode::kIncremental;
  if (name == "chunked") return ScoreMode::kChunked;
  Fail("flag.mode", "--mode: expected full, incremental or chunked, got \"{}\"", name);
}

namespace {

void CheckSequences(const model::ModelConfig& config,
                    const std::vector<std::vector<int32_t>>& sequences) {
  for (size_t b = 0; b < sequences.size(); ++b) {
    if (static_cast<int64_t>(sequences[b].size()) > config.max_position_embeddings) {
      Fail("score", "sequence {} has {} tokens, the model's context is {}", b, sequences[b].size(),
           config.max_position_embeddings);
    }
    for (int32_t id : sequences[b]) {
      if (id < 0 || id >= config.vocab_size) {
        Fail("score", "sequence {}: id {} is not in [0, {})", b, id, config.vocab_size);
      }
    }
  }
}

/// Appends what router `r` said of the rows of `stream`.
void AppendRoutes(const routing::OuterPlan& outer, const routing::Stream& stream, size_t r,
                  Scores* scores) {
  const int64_t num_rows = stream.num_rows(), ways = scores->ways[r];
  const std::vector<uint8_t> flags = OuterFlags(outer, num_rows);
  at::Tensor probs = outer.plan->scores_NC;
  if (outer.rows.defined()) {
    probs = ops::ReplaceRows(at::zeros({num_rows, ways}), outer.rows, probs.contiguous());
  }
  probs = probs.contiguous();
  const float* p = ops::F32(probs);
  for (const routing::Segment& s : stream.segments) {
    Scores::Route& route = scores->routes[s.sequence][r];
    route.probs.insert(route.probs.end(), p + ways * s.begin, p + ways * s.end);
    route.routed.insert(route.routed.end(), flags.begin() + s.begin, flags.begin() + s.end);
  }
}

}  // namespace

Scores Score(const model::Model& model, const std::vector<std::vector<int32_t>>& sequences,
             ScoreMode mode, int64_t chunk, const model::ExitRule& exit) {
  const at::NoGradGuard no_grad;
  CheckSequences(model.config, sequences);
  CheckExit(model, exit);
  if (mode == ScoreMode::kIncremental) chunk = 1;
  if (mode == ScoreMode::kFull) chunk = model.config.max_position_embeddings;
  RaggedCache cache(model.config);
  Scores scores;
  scores.logits.resize(sequences.size());
  scores.rows.resize(model.layers.size());
  scores.routers = model::Routers(model.config);
  for (const model::RouterId& id : scores.routers) {
    const int64_t experts = model.layers[id.layer].router(id.site)->num_experts();
    scores.ways.push_back(experts > 0 ? experts : 2);
  }
  scores.routes.assign(sequences.size(), std::vector<Scores::Route>(scores.routers.size()));
  for (int64_t done = 0;; done += chunk) {
    std::vector<int32_t> ids;
    std::vector<routing::Segment> segments;
    for (size_t b = 0; b < sequences.size(); ++b) {
      const auto length = static_cast<int64_t>(sequences[b].size());
      if (done >= length) continue;
      const auto begin = static_cast<int64_t>(ids.size());
      const int64_t end = std::min(length, done + chunk);
      ids.insert(ids.end(), sequences[b].begin() + done, sequences[b].begin() + end);
      segments.push_back(
          {static_cast<int32_t>(b), begin, begin + end - done, static_cast<int32_t>(done)});
    }
    if (ids.empty()) break;
    const routing::Stream stream = routing::Stream::FromSegments(std::move(segments));
    std::vector<routing::LayerPlans> plans;
    const at::Tensor h = Forward(model, at::tensor(ids, at::kInt), stream,
                                 {.plans = &plans,
                                  .caches = mode == ScoreMode::kFull ? nullptr : &cache.stores(),
                                  .exit = exit});
    const at::Tensor logits = Logits(model, h);
    for (const routing::Segment& s : stream.segments) {
      const float* row = ops::F32(logits) + s.begin * logits.size(1);
      scores.logits[s.sequence].insert(scores.logits[s.sequence].end(), row,
                                       row + (s.end - s.begin) * logits.size(1));
    }
    const auto rows = RowsOf(model.config, stream, plans);
    for (size_t l = 0; l < rows.size(); ++l) scores.rows[l].Add(rows[l]);
    for (size_t r = 0; r < scores.routers.size(); ++r) {
      const model::RouterId& id = scores.routers[r];
      // A row that exited says so at every span; only the layers' routers are asked then.
      const bool exits = exit.kind != model::ExitRule::Kind::kNone;
      const routing::OuterPlan outer =
          PlanOf(plans[id.layer], exits ? routing::Site::kMixer : id.site);
      if (outer.plan->decided()) AppendRoutes(outer, stream, r, &scores);
    }
  }
  return scores;
}

}  // namespace detour::infer
