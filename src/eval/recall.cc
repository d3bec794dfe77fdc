#include "eval/recall.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string>

#include "core/error.h"
#include "core/rng.h"
#include "ops/linear.h"
#include "report/status.h"

namespace detour::eval {

namespace {

using Ids = std::vector<int32_t>;

constexpr std::array kCities = {"Paris",  "London", "Tokyo",  "Cairo", "Lima",   "Oslo",
                                "Madrid", "Rome",   "Berlin", "Quito", "Dublin", "Athens",
                                "Lagos",  "Vienna", "Seoul",  "Delhi", "Boston", "Denver",
                                "Dallas", "Miami",  "Hanoi",  "Sofia", "Prague", "Geneva"};

/// Draws by number, so that a prompt is a function of (seed, length, task, prompt) alone.
class Draws {
 public:
  Draws(uint64_t seed, int64_t length, int64_t pairs, int64_t prompt)
      : rng_(seed, RngPurpose::kEval, static_cast<uint32_t>(length * 64 + pairs),
             static_cast<uint32_t>(prompt)) {}
  int64_t Below(int64_t n) {
    return std::min(static_cast<int64_t>(rng_.Uniform(next_++) * static_cast<double>(n)), n - 1);
  }
  template <typename T>
  void Shuffle(std::vector<T>& values) {
    for (auto i = static_cast<int64_t>(values.size()) - 1; i > 0; --i) {
      std::swap(values[i], values[Below(i + 1)]);
    }
  }

 private:
  Rng rng_;
  int64_t next_ = 0;
};

struct Prompt {
  Ids ids;
  std::vector<std::pair<int64_t, int64_t>> answers;  ///< [begin, end) in ids
};

class Writer {
 public:
  Writer(const data::Tokenizer& tokenizer, const data::TokenShards& shards)
      : tokenizer_(tokenizer), shards_(shards) {}

  Prompt Write(int64_t length, int64_t num_pairs, Draws draws) const {
    std::vector<const char*> cities(kCities.begin(), kCities.end());
    draws.Shuffle(cities);
    std::vector<std::string> values;
    std::vector<Ids> facts;
    std::vector<int64_t> order;
    for (int64_t i = 0; i < num_pairs; ++i) {
      values.push_back(fmt::format("{:05}", draws.Below(100000)));
      facts.push_back(
          Encode(fmt::format("\nThe special magic number for {} is {}.\n", cities[i], values[i])));
      order.push_back(i);
    }
    draws.Shuffle(order);
    Prompt questions;
    Append(Encode("\nRemember the special magic numbers mentioned in the text above."),
           &questions.ids);
    for (const int64_t i : order) {
      Append(Encode(fmt::format("\nThe special magic number for {} is", cities[i])),
             &questions.ids);
      const auto begin = std::ssize(questions.ids);
      Append(Encode(" " + values[i]), &questions.ids);
      questions.answers.emplace_back(begin, std::ssize(questions.ids));
      Append(Encode("."), &questions.ids);
    }
    int64_t room = length - std::ssize(questions.ids);
    for (const Ids& fact : facts) room -= std::ssize(fact);
    if (room < length / 4 || room > shards_.num_tokens()) {
      Fail("eval.recall",
           "a prompt of {} tokens with {} facts: expected room for {} to {} tokens of text, got {}",
           length, num_pairs, length / 4, shards_.num_tokens(), room);
    }
    return Join(Text(room, &draws), facts, questions, &draws);
  }

 private:
  Ids Encode(const std::string& text) const { return tokenizer_.Encode(text); }
  static void Append(const Ids& more, Ids* ids) {
    ids->insert(ids->end(), more.begin(), more.end());
  }

  Ids Text(int64_t num_tokens, Draws* draws) const {
    Ids text(num_tokens);
    shards_.Read(draws->Below(shards_.num_tokens() - num_tokens + 1), text);
    return text;
  }

  /// Facts at rising random places among the first 95 % of the text, then the questions.
  static Prompt Join(const Ids& text, const std::vector<Ids>& facts, const Prompt& questions,
                     Draws* draws) {
    std::vector<int64_t> places;
    for (size_t i = 0; i < facts.size(); ++i) {
      places.push_back(draws->Below(std::ssize(text) * 95 / 100));
    }
    std::sort(places.begin(), places.end());
    Prompt prompt;
    int64_t done = 0;
    for (size_t i = 0; i < facts.size(); ++i) {
      prompt.ids.insert(prompt.ids.end(), text.begin() + done, text.begin() + places[i]);
      done = places[i];
      Append(facts[i], &prompt.ids);
    }
    prompt.ids.insert(prompt.ids.end(), text.begin() + done, text.end());
    const auto shift = std::ssize(prompt.ids);
    Append(questions.ids, &prompt.ids);
    for (const auto& [begin, end] : questions.answers) {
      prompt.answers.emplace_back(begin + shift, end + shift);
    }
    return prompt;
  }

  const data::Tokenizer& tokenizer_;
  const data::TokenShards& shards_;
};

/// Adds the answers of one prompt; returns the tokens that were asked for.
int64_t Ask(const model::Model& model, const Prompt& prompt, RecallResult* result) {
  const at::Tensor ids = at::tensor(prompt.ids, at::kInt);
  const routing::Stream stream = routing::Stream::FromSegments({{0, 0, ids.size(0), 0}});
  const at::Tensor h = Forward(model, ids, stream, {});
  int64_t tokens = 0;
  for (const auto& [begin, end] : prompt.answers) {
    const at::Tensor logits = Logits(model, h.slice(0, begin - 1, end - 1).contiguous());
    const at::Tensor wanted = ids.slice(0, begin, end).to(at::kLong);
    result->right += logits.argmax(1).equal(wanted);
    result->loss -= at::log_softmax(logits, 1).gather(1, wanted.unsqueeze(1)).sum().item<double>();
    result->num_answers += 1;
    tokens += end - begin;
  }
  return tokens;
}

}  // namespace

std::vector<RecallResult> Recall(const model::Model& model, const data::Tokenizer& tokenizer,
                                 const data::TokenShards& shards, const RecallOptions& options) {
  const at::NoGradGuard no_grad;
  if (options.num_pairs < 1 || options.num_pairs > std::ssize(kCities)) {
    Fail("eval.recall", "pairs: expected 1 to {}, got {}", kCities.size(), options.num_pairs);
  }
  const Writer writer(tokenizer, shards);
  std::vector<RecallResult> results;
  report::StatusLine status;
  for (const int64_t length : options.lengths) {
    if (length > model.config.max_position_embeddings) {
      Fail("eval.recall", "length {} is beyond the model's context of {}", length,
           model.config.max_position_embeddings);
    }
    for (const auto& [task, pairs] :
         {std::pair{"needle", int64_t{1}}, std::pair{"pairs", options.num_pairs}}) {
      RecallResult& result = results.emplace_back(RecallResult{length, task});
      int64_t tokens = 0;
      for (int64_t p = 0; p < options.num_prompts; ++p) {
        tokens +=
            Ask(model, writer.Write(length, pairs, Draws(options.seed, length, pairs, p)), &result);
        status.Update(
            fmt::format("recall at {}: {} {}/{}", length, task, p + 1, options.num_prompts));
      }
      result.right /= static_cast<double>(result.num_answers);
      result.loss /= static_cast<double>(tokens);
    }
  }
  status.Finish();
  return results;
}

}  // namespace detour::eval
