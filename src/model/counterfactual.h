// Both ways of a gate at once, for estimators whose gradient compares them (METHODS §7). In
// training only; apart from AddSoftly nothing here changes a value of the forward pass.
#pragma once

#include <functional>

#include "model/model.h"

namespace detour::model {

/// What taking the span adds to each row beyond what leaving it adds, [N, D], without gradients;
/// y is the span's answer for x under the plan. A row that left it is asked what it would have got
/// from attention among the rows that took it (its own key, which nobody wrote, is not among them).
at::Tensor MixerDifference(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                           const at::Tensor& y_ND, const routing::Stream& stream,
                           const routing::Plan& plan);
at::Tensor FfnDifference(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                         const at::Tensor& y_ND, const routing::Plan& plan);
at::Tensor LayerDifference(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                           const at::Tensor& y_ND, const routing::Stream& stream,
                           const routing::Plan& plan);

/// Keys and values of all rows of the stream, as constants: what a key's gate decided about.
ops::GatedKeys KeysOf(const Model& model, const LayerWeights& layer, const at::Tensor& x_ND,
                      const routing::Stream& stream, const routing::Plan& plan);

/// Attention with both ways weighted: x + g · A + (1 − g) · B, B what the plan's bypass adds.
at::Tensor AddSoftly(const at::Tensor& x_ND, const routing::Plan& plan,
                     const std::function<at::Tensor(const routing::Plan&)>& attention);

}  // namespace detour::model
