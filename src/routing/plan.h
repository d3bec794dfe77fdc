// What flows through the engine (rows of a stream) and what a router decided about it (a plan).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "ops/attention.h"

namespace detour::routing {

/// What a router governs: a whole layer, its attention, or its MLP.
enum class Site : uint8_t { kLayer, kMixer, kFfn };
const char* SiteName(Site site);  ///< "layer", "mixer", "ffn"

/// Consecutive rows of one sequence that belong to one document: the unit inside which rows attend
/// to one another.
struct Segment {
  int32_t sequence = 0;
  int64_t begin = 0, end = 0;  ///< rows
  int32_t first_position =
      0;  ///< of row `begin`; positions are consecutive unless rows were chosen
};

/// Flat rows, no padding. Segments are in row order and cover all rows; a sequence with a cache has
/// one segment.
struct Stream {
  std::vector<Segment> segments;
  at::Tensor positions_N;     ///< i32
  at::Tensor ids_N;           ///< i32, token ids; set by Forward
  at::Tensor source_N;        ///< i32, rows of the outermost stream; undefined: the rows themselves
  int64_t num_positions = 0;  ///< above every position
  int64_t num_rows() const { return segments.empty() ? 0 : segments.back().end; }
  int64_t SourceRow(int64_t row) const;

  /// Fills positions_N from the segments.
  static Stream FromSegments(std::vector<Segment> segments);
  /// The stream of some rows (i32, ascending) only, with their positions and segments.
  Stream Select(const at::Tensor& rows_R) const;
};

/// What a row does at the mixer when it does not attend: take its own value, nothing, or attend in
/// a window.
enum class Bypass : uint8_t { kValue, kIdentity, kWindow };

/// Rows that go to one expert, and the weight of its answer.
struct ExpertRows {
  at::Tensor rows;    ///< i32, ascending
  at::Tensor weight;  ///< f32 per row, carries gradients
};

/// Rows that leave a span of several layers after the same number of them.
struct DeepSpan {
  int32_t num_layers = 1;  ///< counted from the layer that decided
  at::Tensor rows;         ///< i32, ascending
};

/// One router's decision about the rows of one span. Rows are indices into the span's stream,
/// ascending.
struct Plan {
  int64_t num_rows = -1;   ///< of the span's stream; -1: nobody decided, every row takes the span
  bool all_routed = true;  ///< rows_R and bypass_rows are undefined then
  at::Tensor rows_R;  ///< i32: rows that take the span (at the mixer: query, and write K and V)
  at::Tensor bypass_rows;  ///< i32: the others
  Bypass bypass = Bypass::kIdentity;
  at::Tensor bypass_D;  ///< f32 with gradient, what the value bypass adds beside; undefined: none
  at::Tensor bypass_H;  ///< f32 with gradient, its weight of each head's value; undefined: 1
  ops::WindowRule window;  ///< of the window bypass: routed rows see it beside the routed ones
  ops::BlockRule blocks;   ///< which keys the rows see; all rows attend then
  bool write_all = false;  ///< bypassed rows write K and V all the same
  std::vector<ExpertRows> experts;  ///< ffn span of a layer with experts
  /// Layer span: rows that go on as x + w · F(x) after the last of so many layers, x the input of
  /// this layer, F(x) what the layers made of it, w their span_weight_N. No row is in two of them.
  std::vector<DeepSpan> deep;

  // With gradients:
  at::Tensor weight_N;       ///< f32, weight of the way each row takes; undefined: 1
  at::Tensor span_weight_N;  ///< f32, weight of each row of `deep`
  at::Tensor gate_N;         ///< f32, how far each row takes the span; what budgets act on
  at::Tensor scores_NC;  ///< f32, probabilities of the ways; column 0 (no experts): take the span
  at::Tensor choice_NE;  ///< f32, probabilities of `choices` if scores_NC are of other ways
  at::Tensor penalty;    ///< f32 scalar: extra loss, summed over rows; undefined: none
  bool counterfactual = false;  ///< gate_N's gradient needs the way a row does not take
  bool key_gradient = false;    ///< … and what its key would change for later rows
  bool soft = false;            ///< training on both ways at once, weights gate_N and 1 − gate_N
  bool soft_keys = false;       ///< … and each key's attention scaled by its row's gate

  std::vector<int64_t> choices;  ///< rows that chose each expert (or depth), before capacity
  int64_t causal_agreed = -1;    ///< rows on which the causal rule agrees; -1: the rule is causal

  bool decided() const { return num_rows >= 0; }
  /// Whether the span runs on rows_R only: in soft training it runs on all.
  bool narrows() const { return decided() && !all_routed && !soft; }
  int64_t NumRouted() const { return all_routed ? num_rows : rows_R.size(0); }
  at::Tensor RoutedRows() const;  ///< i32, also where rows_R is undefined
};

/// The decisions of one layer. Rows of `mixer` and `ffn` count among those that `layer` let in.
struct LayerPlans {
  Plan layer, mixer, ffn;
};

/// One router's plan seen from the layer's stream.
struct OuterPlan {
  const Plan* plan;
  at::Tensor rows;  ///< i32, the layer's rows that reached the router; undefined: all
};
OuterPlan PlanOf(const LayerPlans& plans, Site site);
/// One flag per row of the layer's stream: it reached the router and took the span.
std::vector<uint8_t> OuterFlags(const OuterPlan& outer, int64_t num_rows);

/// Rows with routed[n] != 0 become rows_R, the others bypass_rows.
void SetRows(const std::vector<uint8_t>& routed, Plan* plan);
/// A plan that lets every row in, with probability 1, learns nothing and weighs nothing.
Plan EveryRow(int64_t num_rows);
/// The inverse of SetRows: one flag per row.
std::vector<uint8_t> RoutedFlags(const Plan& plan);
/// The same as f32 [N], 1 for rows that take the span; and [N, 2], that beside its complement.
at::Tensor FlagTensor(const Plan& plan);
at::Tensor OneHot(const Plan& plan);
/// The plan of rows [begin, end), rows counted from `begin`: decisions only, no gradients.
Plan SliceRows(const Plan& plan, int64_t begin, int64_t end);
/// The same for a layer: `begin` and `end` are rows of the layer's stream.
LayerPlans SliceRows(const LayerPlans& plans, int64_t begin, int64_t end);

/// i32 tensor of some rows.
at::Tensor RowTensor(const std::vector<int32_t>& rows);

/// For each of `rows`, the entries among `written` of its own document that are not after it.
std::vector<ops::Prefix> Prefixes(const Stream& stream, const at::Tensor& rows,
                                  const at::Tensor& written);

/// Ranges of rows_R that fall into each segment of the stream (empty ones left out), and their
/// positions.
std::vector<ops::RoutedSegment> RoutedSegments(const Stream& stream, const Plan& plan);
/// Who stays and who sees far under a window bypass; `swapped`: every row sees what it would see if
/// it had been decided the other way.
ops::WindowRows WindowRowsOf(const Stream& stream, const Plan& plan, bool swapped = false);
at::Tensor RoutedPositions(const Stream& stream, const Plan& plan);

}  // namespace detour::routing
