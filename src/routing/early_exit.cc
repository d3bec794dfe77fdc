#include "routing/early_exit.h"

#include <ATen/ATen.h>

#include <cmath>

#include "core/rng.h"

namespace detour::routing {

std::vector<Option> EarlyExitOptions() {
  return {
      NumberOption("max_dropout", 0.1, 0, 1, "probability that the last layer is skipped"),
      NumberOption("exit_scale", 0.2, 0, 100, "weight of the exits' losses, e_scale"),
      ChoiceOption("curriculum", "rotational", {"rotational", "gradual", "all"},
                   "which exits are trained in a step"),
      IntOption("rotation", 4, 1, 1024, "rotational: every so many layers, one further a step")};
}

namespace {

class LayerDropout : public Router {
 public:
  LayerDropout(double probability) : Router(Site::kLayer), probability_(probability) {}

  Plan Decide(const Taps& taps, const DecideArgs& args) const override {
    const int64_t num_rows = taps.stream.num_rows();
    if (args.mode != Mode::kTrain || probability_ == 0) return EveryRow(num_rows);
    std::vector<uint8_t> kept(num_rows);
    if (args.replay) {
      kept = RoutedFlags(*args.replay);
    } else {
      const Rng rng(args.draw.seed, RngPurpose::kRoute, args.draw.step,
                    static_cast<uint32_t>(args.layer));
      int32_t sequence = -1;
      bool keep = true;
      for (const Segment& s : taps.stream.segments) {
        if (s.sequence != sequence) {
          keep = rng.Uniform(args.draw.first_row + taps.stream.SourceRow(s.begin)) >= probability_;
        }
        sequence = s.sequence;
        std::fill(kept.begin() + s.begin, kept.begin() + s.end, keep);
      }
    }
    Plan plan;
    SetRows(kept, &plan);
    plan.scores_NC = OneHot(plan);
    return plan;
  }

 private:
  double probability_;
};

}  // namespace

std::vector<std::unique_ptr<Router>> MakeEarlyExit(const RoutingConfig& config, const Shape& shape,
                                                   int32_t layer) {
  const double depth =
      shape.num_layers > 1 ? static_cast<double>(layer) / (shape.num_layers - 1) : 0;
  return OneRouter(
      std::make_unique<LayerDropout>(config.Number("max_dropout") * (std::exp2(depth) - 1)));
}

std::vector<double> ExitWeights(const RoutingConfig& config, int32_t num_layers, int64_t step,
                                int64_t total_steps) {
  const double scale = config.Number("exit_scale");
  const std::string& curriculum = config.Text("curriculum");
  std::vector<double> weights(num_layers);
  double sum = 0, below = 0;  // Σ_{i<l} i
  for (int32_t l = 0; l < num_layers; ++l) {
    const bool last = l == num_layers - 1;
    bool on = true;
    if (curriculum == "rotational")
      on = l % config.Int("rotation") == step % config.Int("rotation");
    if (curriculum == "gradual") {
      // From the last layer downward, one more every total / (2 L) steps.
      on = num_layers - 1 - l <= 2 * num_layers * step / std::max<int64_t>(total_steps, 1);
    }
    weights[l] = last ? l + scale * below : on ? scale * (below + l) : 0;
    if (num_layers == 1) weights[l] = 1;
    below += l;
    sum += weights[l];
  }
  for (double& w : weights) w /= sum;
  return weights;
}

}  // namespace detour::routing
