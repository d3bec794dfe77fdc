#include "routing/controls.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/error.h"
#include "core/rng.h"
#include "ops/linear.h"

namespace detour::routing {

std::vector<Option> ControlOptions() {
  return {ChoiceOption("decider", "learned", {"learned", "random", "every_nth", "frequency"},
                       "who decides: the router, or a control that knows no content"),
          NumberOption("share", 0.5, 0, 1, "of rows that take the span, by a control"),
          IntOption("decider_seed", 1, 0, 4294967295.0, "of the random control")};
}

std::vector<uint8_t> Control::Rows(const Stream& stream, int32_t layer) const {
  std::vector<uint8_t> rows(stream.num_rows());
  for (size_t n = 0; n < rows.size(); ++n) {
    rows[n] = Score(stream, layer, static_cast<int64_t>(n)) < share_;
  }
  return rows;
}

namespace {

int32_t Position(const Stream& stream, int64_t row) { return ops::I32(stream.positions_N)[row]; }

class RandomControl : public Control {
 public:
  RandomControl(double share, uint64_t seed) : Control(share), seed_(seed) {}
  double Score(const Stream& stream, int32_t layer, int64_t row) const override {
    return Rng(seed_, RngPurpose::kRoute, 0, static_cast<uint32_t>(layer))
        .Uniform(static_cast<uint64_t>(Position(stream, row)));
  }

 private:
  uint64_t seed_;
};

class EveryNthControl : public Control {
 public:
  explicit EveryNthControl(double share) : Control(share) {}
  /// The fractional part of position · share falls below share once per 1 / share positions; the
  /// rows are those, and the score orders them so.
  double Score(const Stream& stream, int32_t, int64_t row) const override {
    const double steps = Position(stream, row) * share_;
    return steps - std::floor(steps);
  }
  int64_t Choice(const Stream& stream, int32_t, int64_t row, int64_t ways) const override {
    return Position(stream, row) % ways;
  }
};

class FrequencyControl : public Control {
 public:
  FrequencyControl(double share, int64_t vocab_size, std::string name)
      : Control(share), name_(std::move(name)), quantile_V_(at::zeros({vocab_size})) {}
  double Score(const Stream& stream, int32_t, int64_t row) const override {
    DETOUR_CHECK(stream.ids_N.defined());
    return ops::F32(quantile_V_)[ops::I32(stream.ids_N)[row]];
  }
  void ForEachTensor(const TensorVisitor& visit) override { visit(name_, quantile_V_); }
  /// A token's value is the part of the text made of rarer tokens (ties: lower ids).
  void SetFrequencies(const std::vector<int64_t>& counts) override {
    DETOUR_CHECK(static_cast<int64_t>(counts.size()) == quantile_V_.size(0));
    std::vector<int32_t> order(counts.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return counts[a] < counts[b]; });
    const double total = std::max<double>(
        1, static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0})));
    const at::NoGradGuard no_grad;
    double below = 0;
    for (int32_t id : order) {
      quantile_V_[id] = below / total;
      below += static_cast<double>(counts[id]);
    }
  }

 private:
  std::string name_;
  at::Tensor quantile_V_;
};

}  // namespace

std::unique_ptr<Control> MakeControl(const RoutingConfig& config, const Shape& shape,
                                     const std::string& prefix) {
  const std::string& decider = config.Text("decider");
  const double share = config.Number("share");
  if (decider == "learned") return nullptr;
  if (decider == "random") {
    return std::make_unique<RandomControl>(share, config.Int("decider_seed"));
  }
  if (decider == "every_nth") return std::make_unique<EveryNthControl>(share);
  return std::make_unique<FrequencyControl>(share, shape.vocab_size, prefix + "token_quantile");
}

}  // namespace detour::routing
