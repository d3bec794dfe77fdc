#include "eval/batch.h"

#include <ATen/ATen.h>

namespace detour::eval {

Batch MakeBatch(const data::TokenShards& shards, std::span<const int64_t> firsts, int64_t seq_len,
                bool document_attention) {
  const auto num_sequences = static_cast<int64_t>(firsts.size());
  Batch batch;
  batch.ids_N = at::empty({num_sequences * seq_len}, at::kInt);
  batch.targets_N = at::empty({num_sequences * seq_len}, at::kInt);
  std::vector<int32_t> tokens(seq_len + 1);
  std::vector<routing::Segment> segments;
  for (int64_t b = 0; b < num_sequences; ++b) {
    shards.Read(firsts[b], tokens);
    const int64_t row = b * seq_len;
    std::copy_n(tokens.begin(), seq_len, batch.ids_N.data_ptr<int32_t>() + row);
    std::copy_n(tokens.begin() + 1, seq_len, batch.targets_N.data_ptr<int32_t>() + row);
    std::vector<int64_t> begins = {0};
    if (document_attention) {
      for (int64_t begin : shards.DocumentBegins(firsts[b], seq_len)) {
        if (begin > 0) begins.push_back(begin);
      }
    }
    for (size_t i = 0; i < begins.size(); ++i) {
      const int64_t end = i + 1 < begins.size() ? begins[i + 1] : seq_len;
      segments.push_back({static_cast<int32_t>(b), row + begins[i], row + end, 0});
    }
  }
  batch.stream = routing::Stream::FromSegments(std::move(segments));
  return batch;
}

}  // namespace detour::eval
