// Mixture-of-Recursions (arXiv 2507.10524; METHODS §5): a stack of M layers runs N times with the
// same weights ("middle cycle"), and each token takes as many of these recursions as it needs. The
// config counts unrolled layers: M · N of them, of which the first M have weights. Keys and values
// are kept by recursion: each unrolled layer has its own, of the rows that took it.
//
// F is the whole stack, residuals included; H a recursion's input, H¹ the first one's.
// choice = "expert": recursion r has a score θ_r·H; of the rows that took recursion r − 1 the
// ⌈(N − r)/N · T⌉ highest of each document (r = 0: all) get H' = α σ(θ_r·H) F(H) + H, the others
// keep H. Top-k looks ahead; what serves is θ_r·H + b_r > 0, trained with top-k membership as label
// (`causal` = "bce"), as mod.h.
// choice = "token": p = softmax(W H¹); a row takes the i recursions of its largest p and gets H¹ +
// α p_i F(… F(H¹)). This is causal. Loads are balanced by N Σ f_i P_i (`aux_loss_coeff`).
//
// Differences from the paper and its public code, and why:
// - token choice: the paper multiplies by the gate after every recursion, the public code after the
//   last one only; we do as the code. A gate in between would scale the stream, which the next norm
//   takes out again, against what the next recursion adds.
// - b_r, which the paper has not: with it the ratio controller can hold the share that serves.
//   Recursion 0 takes every row in all modes and learns no rule (the code trains one whose label is
//   always 1).
// - ⌈·⌉ of a document's tokens, not ⌊·⌋ of a padded sequence's; ties: the earlier token, the
//   shallower depth.
// - no sharing of the first recursion's keys, no warm-up of capacities, linear routers only.
// - a control replaces the score by a depth that knows no content, each of the N equally often; the
//   weight is that of a router that is sure, α.
#pragma once

#include <memory>
#include <vector>

#include "routing/router.h"

namespace detour::routing {

std::vector<Option> RecursionOptions();
void CheckRecursion(const RoutingConfig& config, std::vector<std::string>* faults);
std::vector<std::unique_ptr<Router>> MakeRecursion(const RoutingConfig& config, const Shape& shape,
                                                   int32_t layer);
int32_t RecursionWeightsLayer(const RoutingConfig& config, int32_t layer);

}  // namespace detour::routing
