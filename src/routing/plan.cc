#include "routing/plan.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/error.h"
#include "ops/linear.h"

namespace detour::routing {

at::Tensor RowTensor(const std::vector<int32_t>& rows) {
  at::Tensor t = at::empty({static_cast<int64_t>(rows.size())}, at::kInt);
  std::copy(rows.begin(), rows.end(), t.data_ptr<int32_t>());
  return t;
}

const char* SiteName(Site site) {
  return site == Site::kLayer ? "layer" : site == Site::kMixer ? "mixer" : "ffn";
}

int64_t Stream::SourceRow(int64_t row) const {
  return source_N.defined() ? ops::I32(source_N)[row] : row;
}

Stream Stream::FromSegments(std::vector<Segment> segments) {
  Stream stream;
  stream.segments = std::move(segments);
  stream.positions_N = at::empty({stream.num_rows()}, at::kInt);
  int32_t* positions = stream.positions_N.data_ptr<int32_t>();
  int64_t row = 0;
  for (const Segment& s : stream.segments) {
    DETOUR_CHECK(s.begin == row && s.end > s.begin, "segment [{}, {}) at row {}", s.begin, s.end,
                 row);
    for (; row < s.end; ++row) {
      positions[row] = s.first_position + static_cast<int32_t>(row - s.begin);
    }
    stream.num_positions = std::max(stream.num_positions, s.first_position + s.end - s.begin);
  }
  return stream;
}

Stream Stream::Select(const at::Tensor& rows_R) const {
  Stream chosen;
  const int32_t* rows = ops::I32(rows_R);
  const int64_t num_chosen = rows_R.size(0);
  int64_t begin = 0;
  for (const Segment& s : segments) {
    const int64_t end = std::lower_bound(rows + begin, rows + num_chosen, s.end) - rows;
    if (end > begin) {
      chosen.segments.push_back(
          {s.sequence, begin, end, ops::I32(positions_N)[static_cast<int64_t>(rows[begin])]});
    }
    begin = end;
  }
  chosen.positions_N = positions_N.index_select(0, rows_R);
  if (ids_N.defined()) chosen.ids_N = ids_N.index_select(0, rows_R);
  chosen.source_N = source_N.defined() ? source_N.index_select(0, rows_R) : rows_R;
  chosen.num_positions = num_positions;
  return chosen;
}

void SetRows(const std::vector<uint8_t>& routed, Plan* plan) {
  std::vector<int32_t> rows, bypass;
  for (size_t n = 0; n < routed.size(); ++n) {
    (routed[n] ? rows : bypass).push_back(static_cast<int32_t>(n));
  }
  plan->num_rows = static_cast<int64_t>(routed.size());
  plan->all_routed = bypass.empty();
  plan->rows_R = plan->all_routed ? at::Tensor() : RowTensor(rows);
  plan->bypass_rows = plan->all_routed ? at::Tensor() : RowTensor(bypass);
}

Plan EveryRow(int64_t num_rows) {
  Plan plan;
  SetRows(std::vector<uint8_t>(num_rows, 1), &plan);
  plan.scores_NC = OneHot(plan);
  return plan;
}

at::Tensor FlagTensor(const Plan& plan) {
  const std::vector<uint8_t> flags = RoutedFlags(plan);
  at::Tensor t = at::empty({plan.num_rows}, at::kFloat);
  std::copy(flags.begin(), flags.end(), t.data_ptr<float>());
  return t;
}

at::Tensor OneHot(const Plan& plan) {
  const at::Tensor flags_N = FlagTensor(plan);
  return at::stack({flags_N, 1 - flags_N}, 1);
}

std::vector<uint8_t> RoutedFlags(const Plan& plan) {
  std::vector<uint8_t> flags(plan.num_rows, plan.all_routed ? 1 : 0);
  if (!plan.all_routed) {
    const int32_t* rows = ops::I32(plan.rows_R);
    for (int64_t r = 0; r < plan.rows_R.size(0); ++r) flags[rows[r]] = 1;
  }
  return flags;
}

at::Tensor Plan::RoutedRows() const { return all_routed ? at::arange(num_rows, at::kInt) : rows_R; }

OuterPlan PlanOf(const LayerPlans& plans, Site site) {
  if (site == Site::kLayer) return {&plans.layer, {}};
  return {site == Site::kMixer ? &plans.mixer : &plans.ffn,
          plans.layer.narrows() ? plans.layer.rows_R : at::Tensor()};
}

std::vector<uint8_t> OuterFlags(const OuterPlan& outer, int64_t num_rows) {
  const std::vector<uint8_t> flags = RoutedFlags(*outer.plan);
  if (!outer.rows.defined()) return flags;
  std::vector<uint8_t> all(num_rows);
  for (size_t r = 0; r < flags.size(); ++r) all[ops::I32(outer.rows)[r]] = flags[r];
  return all;
}

namespace {

/// The rows of [begin, end), counted from begin.
at::Tensor RowsWithin(const at::Tensor& rows, int64_t begin, int64_t end) {
  const int32_t* all = ops::I32(rows);
  const auto first = std::lower_bound(all, all + rows.size(0), begin);
  const auto last = std::lower_bound(first, all + rows.size(0), end);
  std::vector<int32_t> within;
  for (auto row = first; row != last; ++row) within.push_back(*row - static_cast<int32_t>(begin));
  return RowTensor(within);
}

}  // namespace

Plan SliceRows(const Plan& plan, int64_t begin, int64_t end) {
  Plan part;
  if (!plan.decided()) return part;
  const std::vector<uint8_t> flags = RoutedFlags(plan);
  SetRows({flags.begin() + begin, flags.begin() + end}, &part);
  part.soft = plan.soft;
  for (const ExpertRows& e : plan.experts) {
    part.experts.push_back({RowsWithin(e.rows, begin, end), {}});
  }
  for (const DeepSpan& s : plan.deep) {
    part.deep.push_back({s.num_layers, RowsWithin(s.rows, begin, end)});
  }
  return part;
}

LayerPlans SliceRows(const LayerPlans& plans, int64_t begin, int64_t end) {
  LayerPlans part{.layer = SliceRows(plans.layer, begin, end), .mixer = {}, .ffn = {}};
  if (plans.layer.narrows()) {
    // The inner spans see only the rows that the layer let in.
    const int32_t* rows = ops::I32(plans.layer.rows_R);
    const int32_t* const last = rows + plans.layer.rows_R.size(0);
    begin = std::lower_bound(rows, last, begin) - rows;
    end = std::lower_bound(rows, last, end) - rows;
  }
  part.mixer = SliceRows(plans.mixer, begin, end);
  part.ffn = SliceRows(plans.ffn, begin, end);
  return part;
}

std::vector<ops::Prefix> Prefixes(const Stream& stream, const at::Tensor& rows,
                                  const at::Tensor& written) {
  std::vector<ops::Prefix> prefixes;
  const int32_t* row = ops::I32(rows);
  const int32_t* const last_row = row + rows.size(0);
  const int32_t* entry = ops::I32(written);
  const int32_t* const first_entry = entry;
  const int32_t* const last_entry = entry + written.size(0);
  for (const Segment& s : stream.segments) {
    entry = std::lower_bound(entry, last_entry, s.begin);
    const int64_t begin = entry - first_entry;
    for (; row < last_row && *row < s.end; ++row) {
      while (entry < last_entry && *entry <= *row) ++entry;
      prefixes.push_back({begin, entry - first_entry});
    }
  }
  return prefixes;
}

std::vector<ops::RoutedSegment> RoutedSegments(const Stream& stream, const Plan& plan) {
  std::vector<ops::RoutedSegment> result;
  const bool all = plan.all_routed;
  const int32_t* rows = all ? nullptr : ops::I32(plan.rows_R);
  const int64_t num_routed = all ? stream.num_rows() : plan.rows_R.size(0);
  int64_t begin = 0;
  for (const Segment& s : stream.segments) {
    const int64_t end =
        all ? s.end : std::lower_bound(rows + begin, rows + num_routed, s.end) - rows;
    if (end > begin) result.push_back({begin, end, s.sequence});
    begin = end;
  }
  return result;
}

ops::WindowRows WindowRowsOf(const Stream& stream, const Plan& plan, bool swapped) {
  const int32_t* positions = ops::I32(stream.positions_N);
  const std::vector<uint8_t> routed =
      plan.decided() ? RoutedFlags(plan) : std::vector<uint8_t>(stream.num_rows(), 1);
  ops::WindowRows rows{plan.window, routed, routed};
  for (int64_t n = 0; n < stream.num_rows(); ++n) {
    if (positions[n] < plan.window.sink) rows.stays[n] = 1;
    rows.far[n] ^= static_cast<uint8_t>(swapped);
  }
  return rows;
}

at::Tensor RoutedPositions(const Stream& stream, const Plan& plan) {
  return plan.all_routed ? stream.positions_N : stream.positions_N.index_select(0, plan.rows_R);
}

}  // namespace detour::routing
