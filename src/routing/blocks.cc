#include "routing/blocks.h"

#include <fmt/format.h>

namespace detour::routing {

std::vector<Option> BlocksOptions() {
  return {IntOption("block_size", 128, 16, 1 << 20, "keys of a block, a multiple of 16"),
          IntOption("top_k", 3, 1, 1 << 20, "blocks that a query head sees, its own included"),
          ChoiceOption("decider", "learned", {"learned", "random"},
                       "by products of query and keys, or by a hash (a control)"),
          IntOption("decider_seed", 1, 0, 1LL << 53, "of the hash")};
}

void CheckBlocks(const RoutingConfig& config, std::vector<std::string>* faults) {
  if (const int64_t size = config.Int("block_size"); size % 16 != 0) {
    faults->push_back(fmt::format("block_size: expected a multiple of 16, got {}", size));
  }
}

namespace {

/// Lets every row in; the keys are chosen where the queries are (ops::MixBlocks).
class BlocksRouter : public Router {
 public:
  explicit BlocksRouter(const ops::BlockRule& rule) : Router(Site::kMixer), rule_(rule) {}

  Plan Decide(const Taps& taps, const DecideArgs&) const override {
    Plan plan = EveryRow(taps.stream.num_rows());
    plan.blocks = rule_;
    return plan;
  }
  ops::BlockRule blocks() const override { return rule_; }

 private:
  ops::BlockRule rule_;
};

}  // namespace

std::vector<std::unique_ptr<Router>> MakeBlocks(const RoutingConfig& config, const Shape&,
                                                int32_t layer) {
  return OneRouter(std::make_unique<BlocksRouter>(ops::BlockRule{
      config.Int("block_size"), config.Int("top_k"), config.Text("decider") == "random",
      static_cast<uint64_t>(config.Int("decider_seed")), layer}));
}

}  // namespace detour::routing
