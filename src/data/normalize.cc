#include "data/normalize.h"

#include <algorithm>

#include "core/error.h"

namespace detour::data {
namespace {

size_t FirstLength(std::string_view text) { return text.empty() ? 0 : ReadUtf8Head(text).length; }

std::string StripAccents(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  ForEachCharacter(text, [&](uint32_t c, size_t begin, size_t end) {
    if (!IsCombiningMark(c)) out += text.substr(begin, end - begin);
  });
  return out;
}

std::string Strip(const NormalizeStep& step, std::string_view text, PieceStart* start) {
  size_t begin = text.size(), end = 0;
  ForEachCharacter(text, [&](uint32_t c, size_t at, size_t after) {
    if (IsWhiteSpace(c)) return;
    begin = std::min(begin, at);
    end = after;
  });
  if (!step.left) begin = 0;
  if (!step.right) end = text.size();
  if (begin >= end) return {};
  *start = start->Part(begin);
  return std::string(text.substr(begin, end - begin));
}

}  // namespace

Replacer::Replacer(const std::string& pattern, bool is_regex, std::string content)
    : literal_(pattern), content_(std::move(content)) {
  if (is_regex) regex_ = std::make_unique<Regex>(OnigurumaToPcre(pattern));
}

std::string Replacer::Apply(std::string_view text, size_t max_bytes, PieceStart* start,
                            Regex::Scratch* scratch) const {
  std::string out;
  if (text.empty()) return out;
  out.reserve(text.size() + text.size() / 8);
  size_t of_first = 0;
  const auto add = [&](size_t begin, size_t end, bool is_match) {
    const std::string_view part = is_match ? content_ : text.substr(begin, end - begin);
    if (start != nullptr && start->of_first > 0) {
      // New text counts as part of the last character that it replaces.
      if (is_match && (end == 0 || end <= start->of_first)) of_first = out.size() + part.size();
      if (!is_match && start->of_first > begin) {
        of_first = out.size() + std::min(start->of_first, end) - begin;
      }
    }
    out += part;
    if (out.size() > max_bytes) {
      Fail("data.tokenizer", "a Replace makes more than {} bytes of a text", max_bytes);
    }
  };
  if (regex_ == nullptr) {
    ForEachLiteral(literal_, text, add);
  } else {
    std::unique_ptr<Regex::Scratch> own;
    if (scratch == nullptr) {
      own = std::make_unique<Regex::Scratch>();
      scratch = own.get();
    }
    std::string old;
    if (HasNewCharacter(text)) old = ReplaceNewCharacters(text);
    ForEachMatch(*regex_, old.empty() ? text : std::string_view(old), scratch, add);
  }
  if (start != nullptr) start->of_first = of_first;
  return out;
}

Normalizer::Normalizer(const std::vector<NormalizeStep>& steps) {
  for (const NormalizeStep& step : steps) {
    auto replacer = step.kind == NormalizeStep::Kind::kReplace
                        ? std::make_unique<Replacer>(step.pattern, step.is_regex, step.content)
                        : nullptr;
    steps_.push_back({step, std::move(replacer)});
  }
}

std::string Normalizer::Run(std::string_view text, PieceStart* start,
                            Regex::Scratch* scratch) const {
  using Kind = NormalizeStep::Kind;
  std::string now(text);
  for (const Step& step : steps_) {
    const bool first = start->of_first > 0;
    switch (step.spec.kind) {
      case Kind::kForm:
        now = Normalize(step.spec.form, now);
        if (first) start->of_first = FirstLength(now);
        break;
      case Kind::kLowercase:
        now = Lowercase(now);
        if (first) start->of_first = FirstLength(now);
        break;
      case Kind::kStripAccents: {
        const bool loses_first =
            first && !now.empty() && IsCombiningMark(DecodeUtf8(now, ReadUtf8Head(now).length));
        now = StripAccents(now);
        if (first) start->of_first = loses_first ? 0 : FirstLength(now);
        break;
      }
      case Kind::kStrip:
        now = Strip(step.spec, now, start);
        break;
      case Kind::kPrepend:
        if (now.empty() || start->continues) break;
        now.insert(0, step.spec.content);
        if (first) start->of_first += step.spec.content.size();
        break;
      case Kind::kReplace:
        now = step.replacer->Apply(now, MaxReplacedBytes(text.size()), start, scratch);
        break;
      case Kind::kByteLevel: {
        const std::string_view head = std::string_view(now).substr(0, start->of_first);
        start->of_first = ToByteCharacters(head).size();
        now = ToByteCharacters(now);
        break;
      }
    }
  }
  return now;
}

}  // namespace detour::data
