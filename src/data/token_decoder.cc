#include "data/token_decoder.h"

#include <unordered_map>

namespace detour::data {
namespace {

using Kind = DecodeStep::Kind;

// Every token of a vocabulary goes through the chain when it is loaded.
constexpr size_t kMaxTokenBytes = size_t{1} << 12;

bool Joins(Kind kind) { return kind == Kind::kByteLevel || kind == Kind::kFuse; }

void ReplaceAll(std::string_view from, std::string_view to, std::string* text) {
  if (text->find(from) == std::string::npos) return;
  std::string out;
  ForEachLiteral(from, *text, [&](size_t begin, size_t end, bool is_match) {
    out += is_match ? to : std::string_view(*text).substr(begin, end - begin);
  });
  *text = std::move(out);
}

void Strip(const DecodeStep& step, std::string* token) {
  std::string_view rest = *token;
  for (int64_t i = 0; i < step.start && rest.starts_with(step.content); ++i) {
    rest.remove_prefix(step.content.size());
  }
  for (int64_t i = 0; i < step.stop && rest.ends_with(step.content); ++i) {
    rest.remove_suffix(step.content.size());
  }
  *token = std::string(rest);
}

/// Byte tokens become bytes; those in a row are one token then.
std::vector<std::string> FallBack(std::vector<std::string> tokens) {
  std::vector<std::string> out;
  bool after_byte = false;
  for (std::string& token : tokens) {
    const std::optional<char> byte = ByteOfToken(token);
    if (!byte) {
      out.push_back(std::move(token));
    } else if (after_byte) {
      out.back().push_back(*byte);
    } else {
      out.emplace_back(1, *byte);
    }
    after_byte = byte.has_value();
  }
  return out;
}

}  // namespace

std::optional<std::string> BytesOfToken(std::string_view token) {
  static const std::unordered_map<std::string_view, char> byte_of = [] {
    std::unordered_map<std::string_view, char> table;
    for (int b = 0; b < 256; ++b) table.emplace(ByteCharacters()[b], static_cast<char>(b));
    return table;
  }();
  std::string bytes;
  while (!token.empty()) {
    const int length = ReadUtf8Head(token).length;
    const auto it = byte_of.find(token.substr(0, length));
    if (it == byte_of.end()) return std::nullopt;
    bytes += it->second;
    token.remove_prefix(length);
  }
  return bytes;
}

std::optional<char> ByteOfToken(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  int byte = 0;
  for (const char c : token.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return std::nullopt;
    byte = 16 * byte + digit;
  }
  return static_cast<char>(byte);
}

TokenDecoder::TokenDecoder(const std::vector<DecodeStep>& steps) : num_before_join_(steps.size()) {
  for (size_t i = 0; i < steps.size(); ++i) {
    const DecodeStep& step = steps[i];
    auto replacer = step.kind == Kind::kReplace
                        ? std::make_unique<Replacer>(step.pattern, step.is_regex, step.content)
                        : nullptr;
    steps_.push_back({step, std::move(replacer)});
    if (num_before_join_ < steps.size()) continue;
    if (Joins(step.kind)) num_before_join_ = i + 1;
    // What these do depends on where a token stands. A Replace behind ByteFallback would see the
    // bytes of several tokens at once.
    if (step.kind == Kind::kMetaspace || step.kind == Kind::kSuffix) concatenates_ = false;
    for (size_t j = 0; j < i; ++j) {
      if (steps[j].kind == Kind::kByteFallback && step.kind != Kind::kFuse) concatenates_ = false;
    }
  }
}

bool TokenDecoder::IsByteLevel() const {
  return steps_.size() == 1 && steps_[0].spec.kind == Kind::kByteLevel;
}

void TokenDecoder::Apply(const Step& step, size_t max_bytes, std::vector<std::string>* tokens) {
  const std::string& content = step.spec.content;
  switch (step.spec.kind) {
    case Kind::kByteLevel:
    case Kind::kFuse: {
      std::string joined;
      for (std::string& token : *tokens) {
        joined += step.spec.kind == Kind::kFuse ? token : BytesOfToken(token).value_or(token);
      }
      tokens->assign(1, std::move(joined));
      break;
    }
    case Kind::kByteFallback:
      *tokens = FallBack(std::move(*tokens));
      break;
    case Kind::kReplace:
      // After ByteFallback a token may be any bytes: those that are not UTF-8 match nothing.
      for (std::string& token : *tokens) {
        std::string out;
        std::string_view rest = token;
        while (!rest.empty()) {
          const size_t valid = ValidUtf8Prefix(rest);
          out += step.replacer->Apply(rest.substr(0, valid), max_bytes, nullptr, nullptr);
          rest.remove_prefix(valid);
          if (rest.empty()) break;
          const int length = ReadUtf8Head(rest).length;
          out += rest.substr(0, length);
          rest.remove_prefix(length);
        }
        token = std::move(out);
      }
      break;
    case Kind::kStrip:
      for (std::string& token : *tokens) Strip(step.spec, &token);
      break;
    case Kind::kMetaspace:
      for (size_t i = 0; i < tokens->size(); ++i) {
        ReplaceAll(content, i == 0 && step.spec.drop_first ? "" : " ", &(*tokens)[i]);
      }
      break;
    case Kind::kSuffix:
      for (size_t i = 0; i < tokens->size(); ++i) {
        ReplaceAll(content, i + 1 == tokens->size() ? "" : " ", &(*tokens)[i]);
      }
      break;
  }
}

std::string TokenDecoder::Token(std::string_view token) const {
  const size_t max_bytes = std::max(kMaxTokenBytes, 64 * token.size());
  // Between two others, neither the first nor the last, and not next to a byte token.
  std::vector<std::string> tokens = {"-", std::string(token), "-"};
  if (num_before_join_ > 0 && Joins(steps_[num_before_join_ - 1].spec.kind)) {
    for (size_t i = 0; i + 1 < num_before_join_; ++i) Apply(steps_[i], max_bytes, &tokens);
    tokens = {std::move(tokens[1])};
    Apply(steps_[num_before_join_ - 1], max_bytes, &tokens);
    return std::move(tokens[0]);
  }
  for (size_t i = 0; i < num_before_join_; ++i) Apply(steps_[i], max_bytes, &tokens);
  return std::move(tokens[1]);
}

std::string TokenDecoder::Finish(std::string text) const {
  const size_t max_bytes = MaxReplacedBytes(text.size());
  std::vector<std::string> tokens = {std::move(text)};
  for (size_t i = num_before_join_; i < steps_.size(); ++i) Apply(steps_[i], max_bytes, &tokens);
  return std::move(tokens[0]);
}

std::string TokenDecoder::Decode(std::vector<std::string> tokens) const {
  size_t num_bytes = 0;
  for (const std::string& token : tokens) num_bytes += token.size();
  const size_t max_bytes = MaxReplacedBytes(num_bytes);
  for (const Step& step : steps_) Apply(step, max_bytes, &tokens);
  std::string text;
  for (const std::string& token : tokens) text += token;
  return text;
}

}  // namespace detour::data
