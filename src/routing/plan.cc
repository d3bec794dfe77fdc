#include "routing/plan.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/error.h"
#include "ops/linear.h"

namespace detour::routing {

namespace {

at::Tensor IntTensor(const std::vector<int32_t>& values) {
  at::Tensor t = at::empty({static_cast<int64_t>(values.size())}, at::kInt);
  std::copy(values.begin(), values.end(), t.data_ptr<int32_t>());
  return t;
}

}  // namespace

Stream Stream::FromSegments(std::vector<Segment> segments) {
  Stream stream{.segments = std::move(segments), .positions_N = {}};
  stream.positions_N = at::empty({stream.num_rows()}, at::kInt);
  int32_t* positions = stream.positions_N.data_ptr<int32_t>();
  int64_t row = 0;
  for (const Segment& s : stream.segments) {
    DETOUR_CHECK(s.begin == row && s.end > s.begin, "segment [{}, {}) at row {}", s.begin, s.end,
                 row);
    for (; row < s.end; ++row) {
      positions[row] = s.first_position + static_cast<int32_t>(row - s.begin);
    }
  }
  return stream;
}

void SetRows(const std::vector<uint8_t>& routed, Plan* plan) {
  std::vector<int32_t> rows, bypass;
  for (size_t n = 0; n < routed.size(); ++n) {
    (routed[n] ? rows : bypass).push_back(static_cast<int32_t>(n));
  }
  plan->all_routed = bypass.empty();
  plan->rows_R = plan->all_routed ? at::Tensor() : IntTensor(rows);
  plan->bypass_rows = plan->all_routed ? at::Tensor() : IntTensor(bypass);
  if (!plan->scores_N2.defined()) return;
  at::Tensor is_routed = at::empty({static_cast<int64_t>(routed.size())}, at::kBool);
  std::copy(routed.begin(), routed.end(), is_routed.data_ptr<bool>());
  plan->weight_N = at::where(is_routed, plan->scores_N2.select(1, 0), plan->scores_N2.select(1, 1));
}

std::vector<uint8_t> RoutedFlags(const Plan& plan, int64_t num_rows) {
  std::vector<uint8_t> flags(num_rows, plan.all_routed ? 1 : 0);
  if (!plan.all_routed) {
    const int32_t* rows = ops::I32(plan.rows_R);
    for (int64_t r = 0; r < plan.rows_R.size(0); ++r) flags[rows[r]] = 1;
  }
  return flags;
}

std::vector<ops::RoutedSegment> RoutedSegments(const Stream& stream, const Plan& plan) {
  std::vector<ops::RoutedSegment> result;
  const int32_t* rows = plan.all_routed ? nullptr : ops::I32(plan.rows_R);
  const int64_t num_routed = plan.NumRouted(stream);
  int64_t begin = 0;
  for (const Segment& s : stream.segments) {
    const int64_t end =
        plan.all_routed ? s.end : std::lower_bound(rows + begin, rows + num_routed, s.end) - rows;
    if (end > begin) result.push_back({begin, end, s.sequence});
    begin = end;
  }
  return result;
}

at::Tensor RoutedPositions(const Stream& stream, const Plan& plan) {
  return plan.all_routed ? stream.positions_N : stream.positions_N.index_select(0, plan.rows_R);
}

}  // namespace detour::routing
