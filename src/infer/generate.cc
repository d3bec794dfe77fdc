#include "infer/generate.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/error.h"
#include "infer/sequence.h"
#include "ops/rows.h"
#include "report/status.h"

namespace detour::infer {

namespace {

/// A request under way.
struct Active {
  size_t index = 0;
  std::vector<int32_t> tokens;  // prompt and answer
  int64_t num_done = 0;         // tokens that are in the cache
  int64_t prompt_length = 0;
  RequestResult result;
};

void CheckRequest(const model::ModelConfig& config, const Request& request, size_t index) {
  if (request.prompt.empty()) Fail("generate.prompt", "prompt {} has no tokens", index);
  for (int32_t id : request.prompt) {
    if (id < 0 || id >= config.vocab_size) {
      Fail("generate.prompt", "prompt {}: id {} is not in [0, {})", index, id, config.vocab_size);
    }
  }
  const auto length = static_cast<int64_t>(request.prompt.size());
  if (length >= config.max_position_embeddings) {
    Fail("generate.prompt",
         "prompt {} has {} tokens; the model's context of {} leaves no room for an answer", index,
         length, config.max_position_embeddings);
  }
}

}  // namespace

void CheckRequests(const model::ModelConfig& config, const std::vector<Request>& requests) {
  for (size_t i = 0; i < requests.size(); ++i) CheckRequest(config, requests[i], i);
}

namespace {

class Generator {
 public:
  Generator(const model::Model& model, const std::vector<Request>& requests,
            const GenerateOptions& options, const GenerateCalls& calls, GenerateStats* stats)
      : model_(model),
        requests_(requests),
        options_(options),
        calls_(calls),
        stats_(stats),
        cache_(model.config) {}

  void Run() {
    CheckRequests(model_.config, requests_);
    CheckSamplingOptions(options_.sampling);
    size_t next = 0;
    while (next < requests_.size() || !active_.empty()) {
      if (calls_.stopping && calls_.stopping()) return StopAll();
      while (next < requests_.size() && static_cast<int64_t>(active_.size()) < options_.max_batch) {
        const auto& prompt = requests_[next].prompt;
        active_.push_back({next, prompt, 0, static_cast<int64_t>(prompt.size()), {}});
        active_.back().result.routed_tokens.resize(model_.layers.size());
        stats_->prompt_tokens += static_cast<int64_t>(prompt.size());
        ++next;
      }
      Step();
    }
  }

 private:
  void End(Active& a, std::string why) {
    a.result.finish_reason = std::move(why);
    cache_.Remove(static_cast<int32_t>(a.index));
    if (calls_.on_result) calls_.on_result(a.index, std::move(a.result));
  }

  void StopAll() {
    for (Active& a : active_) End(a, "stopped");
    active_.clear();
  }

  /// One forward pass: the next chunk of each prompt, the last token of each answer.
  void Step() {
    std::vector<routing::Segment> segments;
    std::vector<int32_t> ids;
    std::vector<int32_t> last_rows;  // of requests whose next token is due
    bool prefill = false;
    for (const Active& a : active_) {
      const auto begin = static_cast<int64_t>(ids.size());
      const int64_t left = static_cast<int64_t>(a.tokens.size()) - a.num_done;
      const int64_t n = std::min(left, options_.prefill_chunk);
      ids.insert(ids.end(), a.tokens.begin() + a.num_done, a.tokens.begin() + a.num_done + n);
      segments.push_back(
          {static_cast<int32_t>(a.index), begin, begin + n, static_cast<int32_t>(a.num_done)});
      if (n == left) last_rows.push_back(static_cast<int32_t>(begin + n - 1));
      prefill |= a.num_done < a.prompt_length;
    }
    const double start = report::MonotonicSeconds();
    const at::Tensor ids_N = at::tensor(ids, at::kInt);
    const routing::Stream stream = routing::Stream::FromSegments(std::move(segments));
    std::vector<routing::LayerPlans> plans;
    const at::Tensor h =
        Forward(model_, ids_N, stream,
                {.plans = &plans, .caches = &cache_.stores(), .exit = options_.exit});
    CountRouted(stream, plans);
    stats_->peak_kv_bytes = std::max(stats_->peak_kv_bytes, cache_.bytes());
    at::Tensor logits;
    if (!last_rows.empty()) {
      logits = Logits(model_, ops::GatherRows(h, at::tensor(last_rows, at::kInt)));
    }
    Advance(stream, logits);
    const double seconds = report::MonotonicSeconds() - start;
    (prefill ? stats_->prefill_seconds : stats_->decode_seconds) += seconds;
    if (!prefill) stats_->decode_tokens += static_cast<int64_t>(last_rows.size());
  }

  void CountRouted(const routing::Stream& stream, const std::vector<routing::LayerPlans>& plans) {
    for (size_t l = 0; l < plans.size(); ++l) {
      const std::vector<uint8_t> flags = AttendingRows(plans[l], stream.num_rows());
      for (size_t i = 0; i < active_.size(); ++i) {
        const routing::Segment& s = stream.segments[i];
        active_[i].result.routed_tokens[l] +=
            std::count(flags.begin() + s.begin, flags.begin() + s.end, 1);
      }
    }
  }

  /// Marks the rows as done, samples where a token is due, drops requests that ended.
  void Advance(const routing::Stream& stream, const at::Tensor& logits) {
    int64_t logits_row = 0;
    std::vector<Active> still;
    for (size_t i = 0; i < active_.size(); ++i) {
      Active& a = active_[i];
      a.num_done += stream.segments[i].end - stream.segments[i].begin;
      a.result.num_positions = a.num_done;
      std::string finished;
      if (a.num_done == static_cast<int64_t>(a.tokens.size())) {
        const std::span<const float> row(ops::F32(logits) + logits_row++ * logits.size(1),
                                         logits.size(1));
        finished = AddToken(a, row);
      }
      if (finished.empty()) {
        still.push_back(std::move(a));
      } else {
        End(a, finished);
      }
    }
    active_ = std::move(still);
  }

  /// Samples the next token; returns why the request ended, or "".
  std::string AddToken(Active& a, std::span<const float> logits) {
    const int64_t max_tokens = requests_[a.index].max_tokens;
    if (max_tokens <= 0) return "length";  // and no token is drawn
    const int32_t token =
        Sample(logits, a.tokens, options_.sampling, static_cast<uint32_t>(a.index),
               static_cast<uint32_t>(a.tokens.size()));
    ++stats_->new_tokens;
    const AnswerLimits limits{max_tokens, model_.config.max_position_embeddings, {options_.eos_id}};
    std::function<bool(int32_t)> on_token;
    if (calls_.on_token) on_token = [&](int32_t id) { return calls_.on_token(a.index, id); };
    return AppendToken(token, limits, on_token, &a.tokens, &a.result.tokens);
  }

  const model::Model& model_;
  const std::vector<Request>& requests_;
  const GenerateOptions& options_;
  const GenerateCalls& calls_;
  GenerateStats* stats_;
  RaggedCache cache_;
  std::vector<Active> active_;
};

}  // namespace

void GenerateEach(const model::Model& model, const std::vector<Request>& requests,
                  const GenerateOptions& options, const GenerateCalls& calls,
                  GenerateStats* stats) {
  const at::NoGradGuard no_grad;
  CheckExit(model, options.exit);
  GenerateStats ignored;
  Generator(model, requests, options, calls, stats ? stats : &ignored).Run();
}

std::vector<RequestResult> Generate(const model::Model& model, const std::vector<Request>& requests,
                                    const GenerateOptions& options, const OnToken& on_token,
                                    GenerateStats* stats) {
  std::vector<RequestResult> results(requests.size());
  const auto keep = [&](size_t i, RequestResult result) { results[i] = std::move(result); };
  GenerateEach(model, requests, options, {on_token, keep, nullptr}, stats);
  return results;
}

}  // namespace detour::infer
