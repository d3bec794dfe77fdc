// How GGUF files of the Llama family differ from Hugging Face's: names, the order of the rows of Q
// and K, factors of rotary frequencies.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/config.h"

namespace detour::convert {

/// A `general.architecture` that is read and written.
struct GgufArchitecture {
  const char* name;   ///< also the model_type of transformers
  bool pairs_rotate;  ///< Q and K have the two halves of a head interleaved
};
/// Null for one that is not known.
const GgufArchitecture* FindArchitecture(std::string_view name);
/// "llama, qwen2, qwen3"
std::string KnownArchitectures();

/// "model.layers.3.self_attn.q_proj.weight" -> "blk.3.attn_q.weight"; "" if the format has no name
/// for it.
std::string GgufName(std::string_view name);

/// The heads whose rows a file of an architecture with pairs_rotate reorders: those of Q or K
/// (their weights and biases); 0: the tensor is stored as it is.
int64_t ReorderedHeads(const model::ModelConfig& config, std::string_view name);

/// Row r of a head of K rows in the file is row (r % 2) · K/2 + r / 2 of ours.
inline int64_t OurRow(int64_t file_row, int64_t head_rows) {
  const int64_t head = file_row / head_rows, r = file_row % head_rows;
  return head * head_rows + r % 2 * (head_rows / 2) + r / 2;
}
/// Its inverse.
inline int64_t FileRow(int64_t our_row, int64_t head_rows) {
  const int64_t head = our_row / head_rows, r = our_row % head_rows, half = head_rows / 2;
  return head * head_rows + (r < half ? 2 * r : 2 * (r - half) + 1);
}
/// Rows of all heads, each of `head_rows`, from the file's order to ours, in place. Needs the
/// memory of one head.
void ReorderToOurs(std::span<float> values, int64_t num_heads, int64_t head_rows);

/// By what each of the K/2 rotary frequencies is divided (rope_freqs.weight), for rope_type llama3.
std::vector<float> RopeFactors(const model::ModelConfig& config);

}  // namespace detour::convert
