// Attention in a window that moves over all rows, and among the entries that stay.
#include <ATen/ATen.h>

#include <algorithm>

#include "core/error.h"
#include "ops/attend.h"
#include "ops/linear.h"

namespace detour::ops {

namespace {

/// Rows that share a page table; the tables of rows far apart would have little in common.
constexpr int64_t kRowsTogether = 32;

/// The first of the ascending entries [begin, end) whose position is at least `position`.
template <class PositionOf>
int64_t FirstFrom(int64_t begin, int64_t end, int64_t position, const PositionOf& position_of) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (position_of(middle) < position) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

/// What one document's rows see: entries [0, kept) of those that stay, [begin, own] of the recent.
struct Sight {
  int64_t kept, begin;
};
template <class RecentPosition, class StayedPosition>
class Views {
 public:
  Views(const WindowRule& rule, int64_t num_stayed, RecentPosition recent, StayedPosition stayed)
      : rule_(rule),
        num_stayed_(num_stayed),
        recent_(recent),
        stayed_(stayed),
        num_sink_(FirstFrom(0, std::min(num_stayed, rule.sink), rule.sink, stayed)) {}

  Sight Of(int64_t own, int64_t position, bool far) const {
    const int64_t from = position - rule_.size + 1;
    return {FirstFrom(0, far ? num_stayed_ : num_sink_, from, stayed_),
            FirstFrom(std::max<int64_t>(0, own - rule_.size + 1), own, from, recent_)};
  }

 private:
  const WindowRule& rule_;
  int64_t num_stayed_;
  RecentPosition recent_;
  StayedPosition stayed_;
  int64_t num_sink_;
};

at::Tensor StayingRows(const std::vector<uint8_t>& stays, const RoutedSegment& s) {
  std::vector<int32_t> rows;
  for (int64_t n = s.begin; n < s.end; ++n) {
    if (stays[n]) rows.push_back(static_cast<int32_t>(n));
  }
  return at::tensor(rows, at::kInt);
}

/// The kernel's segments of one call, and the tables that they point to.
struct Tables {
  std::vector<std::unique_ptr<std::vector<const float*>>> pages;
  std::vector<kernels::RowView> views;  // of all rows
  std::vector<kernels::AttendSegment> segments;

  /// Rows [row, row + sights.size()), of which the first has the recent entry `own`.
  void Add(int64_t row, int64_t own, const std::vector<Sight>& sights, float* const* stayed,
           float* const* recent) {
    constexpr int64_t kPage = kernels::kPageEntries;
    const auto count = std::ssize(sights);
    const int64_t stayed_pages = (sights.back().kept + kPage - 1) / kPage;
    const int64_t first = sights[0].begin / kPage, last = (own + count - 1) / kPage;
    auto table = std::make_unique<std::vector<const float*>>(stayed, stayed + stayed_pages);
    table->insert(table->end(), recent + first, recent + last + 1);
    const int64_t shift = (stayed_pages - first) * kPage;
    for (int64_t i = 0; i < count; ++i) {
      views[row + i] = {sights[i].kept, sights[i].begin + shift, own + i + 1 + shift};
    }
    segments.push_back({table->data(), row, count, 0, &views[row]});
    pages.push_back(std::move(table));
  }
};

/// Writes one document's entries and adds its rows to the tables.
void AddDocument(const at::Tensor& k, const at::Tensor& v, const AttendShape& shape,
                 const RoutedSegment& s, const WindowRows& rows, KvStore& store, Tables* tables) {
  const int64_t n = s.end - s.begin;
  const kernels::KvLayout& layout = shape.layout;
  const KvStore::Pages recent = WriteSegment(shape, s, k, v, *store.recent());
  const at::Tensor staying = StayingRows(rows.stays, s);
  const int64_t num_staying = staying.size(0);
  AttendShape of_staying = shape;
  of_staying.positions_W = shape.positions_W.index_select(0, staying);
  const KvStore::Pages stayed =
      WriteSegment(of_staying, {0, num_staying, s.sequence}, k.index_select(0, staying),
                   v.index_select(0, staying), store);
  const Views views(
      rows.rule, stayed.first_entry + num_staying,
      [&](int64_t e) { return layout.Position(recent.pages, e); },
      [&](int64_t e) { return layout.Position(stayed.pages, e); });
  const int32_t* positions = I32(shape.positions_W) + s.begin;
  store.recent()->Forget(s.sequence, recent.first_entry - rows.rule.size - kRollback);
  for (int64_t i = 0; i < n;) {
    std::vector<Sight> sights;
    const int64_t first = i;
    const bool far = rows.far[s.begin + first];
    for (; i < n && i - first < kRowsTogether && (rows.far[s.begin + i] != 0) == far; ++i) {
      sights.push_back(views.Of(recent.first_entry + i, positions[i], far));
    }
    tables->Add(s.begin + first, recent.first_entry + first, sights, stayed.pages, recent.pages);
  }
}

/// What the rows of one document see where no store holds more than they write: of the `staying`
/// rows, and of all, both counted from the document's first.
std::vector<Sight> SightsOf(const at::Tensor& positions_N, const RoutedSegment& s,
                            const WindowRows& rows, const at::Tensor& staying) {
  const int32_t *positions = I32(positions_N), *stay = I32(staying);
  const Views views(
      rows.rule, staying.size(0), [&](int64_t e) { return positions[s.begin + e]; },
      [&](int64_t e) { return positions[stay[e]]; });
  std::vector<Sight> sights;
  for (int64_t n = s.begin; n < s.end; ++n) {
    sights.push_back(views.Of(n - s.begin, positions[n], rows.far[n]));
  }
  return sights;
}

/// Gradients of one document's rows, whose table of entries is those that stay, then all.
void AddGradients(const at::Tensor& positions_N, const RoutedSegment& s, const WindowRows& rows,
                  AttentionGradients& g) {
  const at::Tensor staying = StayingRows(rows.stays, s);
  const int64_t num_staying = staying.size(0), num_rows = s.end - s.begin;
  std::vector<int32_t> entries(I32(staying), I32(staying) + num_staying);
  for (int64_t n = s.begin; n < s.end; ++n) entries.push_back(static_cast<int32_t>(n));
  std::vector<kernels::RowView> row_views;
  for (const Sight& sight : SightsOf(positions_N, s, rows, staying)) {
    const int64_t own = num_staying + std::ssize(row_views);
    row_views.push_back({sight.kept, num_staying + sight.begin, own + 1});
  }
  g.Add({{.row_begin = s.begin,
          .num_rows = num_rows,
          .num_entries = std::ssize(entries),
          .entries = entries.data(),
          .views = row_views.data()}});
}

}  // namespace

at::Tensor MixWindow(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const AttendShape& shape, const WindowRows& rows) {
  DETOUR_CHECK(shape.layout.with_positions && std::ssize(rows.stays) == q.size(0) &&
               rows.far.size() == rows.stays.size());
  return MixRows(q, k, v, shape, [&](at::Tensor& out, const at::Tensor& lse) -> BackwardFn {
    CallPages call(shape.layout, /*with_recent=*/true);
    KvStore& store = shape.store ? *shape.store : call;
    Tables tables;
    tables.views.resize(q.size(0));
    for (const RoutedSegment& s : shape.segments) AddDocument(k, v, shape, s, rows, store, &tables);
    RunAttend(shape, q, tables.segments, out, lse);
    return [rows, segments = shape.segments, positions = shape.positions_W](AttentionGradients& g) {
      for (const RoutedSegment& s : segments) AddGradients(positions, s, rows, g);
    };
  });
}

int64_t VisitedInWindow(const AttendShape& shape, const WindowRows& rows) {
  int64_t visited = 0;
  for (const RoutedSegment& s : shape.segments) {
    int64_t own = 0;
    for (const Sight& sight : SightsOf(shape.positions_W, s, rows, StayingRows(rows.stays, s))) {
      visited += sight.kept + ++own - sight.begin;
    }
  }
  return visited;
}

}  // namespace detour::ops
