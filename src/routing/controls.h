// Controls for science: deciders that know nothing of a token's content, in place of a learned one.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

/// Options `decider` (learned, random, every_nth, frequency), `share` and `decider_seed`.
std::vector<Option> ControlOptions();

/// random: a hash of (seed, layer, position); every_nth: evenly spaced positions; frequency: the
/// rarest tokens, by a table of the training text that the checkpoint stores.
class Control {
 public:
  virtual ~Control() = default;
  /// In [0, 1) per row: a row takes the span if this is below the share.
  virtual double Score(const Stream& stream, int32_t layer, int64_t row) const = 0;
  /// Which of `ways` a row takes.
  virtual int64_t Choice(const Stream& stream, int32_t layer, int64_t row, int64_t ways) const {
    return static_cast<int64_t>(Score(stream, layer, row) * static_cast<double>(ways));
  }
  virtual std::vector<uint8_t> Rows(const Stream& stream, int32_t layer) const;
  virtual void ForEachTensor(const TensorVisitor&) {}
  virtual void SetFrequencies(const std::vector<int64_t>&) {}

 protected:
  explicit Control(double share) : share_(share) {}
  double share_;
};

/// Null if the config's decider is "learned".
std::unique_ptr<Control> MakeControl(const RoutingConfig& config, const Shape& shape,
                                     const std::string& prefix);

}  // namespace detour::routing
