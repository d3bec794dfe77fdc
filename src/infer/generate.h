// Prompts -> tokens: one ragged batch, prompts in chunks, all through the same Forward.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "infer/ragged_cache.h"
#include "infer/sampler.h"
#include "model/model.h"

namespace detour::infer {

struct Request {
  std::vector<int32_t> prompt;  ///< at least one token
  int64_t max_tokens = 128;
};

struct GenerateOptions {
  SamplingOptions sampling;
  int64_t prefill_chunk = 512;  ///< prompt tokens of one request per forward pass
  int64_t max_batch = 64;       ///< requests that run at the same time
  int32_t eos_id = -1;          ///< ends a request; -1: none
  model::ExitRule exit;         ///< rows may stop early
};

struct RequestResult {
  std::vector<int32_t> tokens;         ///< generated, without eos
  std::string finish_reason;           ///< "eos", "length", "context", "stopped"
  std::vector<int64_t> routed_tokens;  ///< per layer: tokens of prompt and answer that attended
  int64_t num_positions = 0;           ///< tokens that went through the model
};

struct GenerateStats {
  int64_t prompt_tokens = 0, new_tokens = 0;
  double prefill_seconds = 0;  ///< forward passes that held prompt rows
  double decode_seconds = 0;   ///< all others
  int64_t decode_tokens = 0;   ///< made in decode_seconds
  int64_t peak_kv_bytes = 0;
};

/// Error("generate.prompt") for what Generate refuses.
void CheckRequests(const model::ModelConfig& config, const std::vector<Request>& requests);

/// Called for each new token; false stops the request (a stop string was found).
using OnToken = std::function<bool(size_t request, int32_t token)>;
/// Called when a request ends; after that nothing is kept of it.
using OnResult = std::function<void(size_t request, RequestResult result)>;

struct GenerateCalls {
  OnToken on_token;                ///< may be empty
  OnResult on_result;              ///< may be empty
  std::function<bool()> stopping;  ///< true: end all requests, begin no other; may be empty
};

/// Answers all requests. What a request gets depends on its prompt, the options and its index
/// alone: never on the others, the chunk size or the batch. Error("generate.prompt") for an empty
/// prompt, ids out of range, or a prompt that leaves no room in the model's context. Memory: that
/// of max_batch requests.
void GenerateEach(const model::Model& model, const std::vector<Request>& requests,
                  const GenerateOptions& options, const GenerateCalls& calls,
                  GenerateStats* stats = nullptr);
/// The same, all results at the end.
std::vector<RequestResult> Generate(const model::Model& model, const std::vector<Request>& requests,
                                    const GenerateOptions& options, const OnToken& on_token,
                                    GenerateStats* stats = nullptr);

}  // namespace detour::infer
