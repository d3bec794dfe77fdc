// What flows through the engine (rows of a stream) and what a router decided about it (a plan).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "ops/attention.h"

namespace detour::routing {

/// Consecutive rows of one sequence that belong to one document: the unit inside which rows attend
/// to one another.
struct Segment {
  int32_t sequence = 0;
  int64_t begin = 0, end = 0;  ///< rows
  int32_t first_position = 0;  ///< of row `begin`; positions are consecutive
};

/// Flat rows, no padding. Segments are in row order and cover all rows; a sequence with a cache has
/// one segment.
struct Stream {
  std::vector<Segment> segments;
  at::Tensor positions_N;  ///< i32
  int64_t num_rows() const { return segments.empty() ? 0 : segments.back().end; }

  /// Fills positions_N from the segments.
  static Stream FromSegments(std::vector<Segment> segments);
};

/// The decision of one layer's mixer. Rows are indices into the stream, ascending.
struct Plan {
  bool all_routed = true;  ///< rows_R and bypass_rows are undefined then
  at::Tensor rows_R;       ///< i32: rows that query, and write K and V
  at::Tensor bypass_rows;  ///< i32: the others: value bypass
  at::Tensor
      weight_N;  ///< f32, the branch's weight per row, carries the router's gradient; undefined: 1
  at::Tensor
      scores_N2;  ///< f32 with gradient, probabilities (attend, bypass); undefined without a router
  at::Tensor budget_sum;  ///< f32 scalar with gradient: Σ over rows of p(attend); undefined without
                          ///< a router

  int64_t NumRouted(const Stream& stream) const {
    return all_routed ? stream.num_rows() : rows_R.size(0);
  }
};

/// Rows with routed[n] != 0 become rows_R, the others bypass_rows; weight_N becomes the probability
/// of each row's branch, if the plan has scores.
void SetRows(const std::vector<uint8_t>& routed, Plan* plan);
/// The inverse: one flag per row.
std::vector<uint8_t> RoutedFlags(const Plan& plan, int64_t num_rows);

/// Ranges of rows_R that fall into each segment of the stream (empty ones left out), and their
/// positions.
std::vector<ops::RoutedSegment> RoutedSegments(const Stream& stream, const Plan& plan);
at::Tensor RoutedPositions(const Stream& stream, const Plan& plan);

}  // namespace detour::routing
