#include "data/chat_encoder.h"

#include <algorithm>
#include <functional>
#include <set>

#include "core/error.h"
#include "data/unicode.h"

namespace detour::data {

namespace {

// The private-use characters of plane 15.
constexpr char32_t kFirstPrivate = 0xF0000, kLastPrivate = 0xFFFFD;

void ForEachString(const Json& value, const std::function<void(const std::string&)>& visit) {
  if (value.is_string()) {
    visit(value.get_ref<const std::string&>());
  } else if (value.is_structured()) {
    for (const Json& item : value) ForEachString(item, visit);
  }
}

}  // namespace

ChatEncoder::ChatEncoder(const Tokenizer& tokenizer, const ChatTemplate& chat)
    : tokenizer_(tokenizer), chat_(chat) {
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    if (!tokenizer.IsSpecial(id)) continue;
    const std::string text = tokenizer.TokenText(id);
    if (text.empty()) continue;
    const std::vector<int32_t> ids = tokenizer.Encode(text);
    specials_.push_back({text, id, std::ranges::count(ids, id) > 0});
  }
  std::ranges::stable_sort(
      specials_, [](const Special& a, const Special& b) { return a.text.size() > b.text.size(); });
}

/// The longest special token whose text stands at `at`.
const ChatEncoder::Special* ChatEncoder::Find(std::string_view text, size_t at) const {
  for (const Special& s : specials_) {
    if (text.substr(at).starts_with(s.text)) return &s;
  }
  return nullptr;
}

bool ChatEncoder::HasSpecial(std::string_view text) const {
  for (const Special& s : specials_) {
    if (!s.parsed && text.find(s.text) != std::string_view::npos) return true;
  }
  // Whatever the tokenizer does before it looks for them, that makes the difference.
  return tokenizer_.Encode(text) != tokenizer_.Encode(text, {.parse_special = false});
}

/// The text with each special token replaced by the private-use character of its index.
std::string ChatEncoder::Disguise(const std::string& text, char32_t base) const {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const Special* s = Find(text, at);
    if (!s) {
      out += text[at++];
      continue;
    }
    AppendUtf8(base + static_cast<uint32_t>(s - specials_.data()), &out);
    at += s->text.size();
  }
  if (HasSpecial(out)) {
    Fail("data.chat",
         "a message has the text of a special token in a form that cannot be told apart from the "
         "token: {}",
         Printable(text, 60));
  }
  return out;
}

void ChatEncoder::DisguiseAll(Json& value, char32_t base) const {
  if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    if (HasSpecial(text)) value = Disguise(text, base);
  } else if (value.is_structured()) {
    for (Json& item : value) DisguiseAll(item, base);
  }
}

/// Ids of the template's output; characters from `base` on (0: none) stand for ordinary text.
std::vector<int32_t> ChatEncoder::EncodeRendered(std::string_view text, char32_t base) const {
  std::vector<int32_t> ids;
  size_t done = 0;
  const auto encode = [&](std::string_view part, const EncodeOptions& options) {
    if (part.empty()) return;
    const std::vector<int32_t> more = tokenizer_.Encode(part, options);
    ids.insert(ids.end(), more.begin(), more.end());
  };
  const bool parse = std::ranges::any_of(specials_, [](const Special& s) { return !s.parsed; });
  ForEachCharacter(text, [&](uint32_t c, size_t begin, size_t end) {
    if (begin < done) return;  // inside a special token
    if (base != 0 && c >= base && c < base + specials_.size()) {
      encode(text.substr(done, begin - done), {});
      encode(specials_[c - base].text, {.parse_special = false});
      done = end;
      return;
    }
    const Special* s = parse ? Find(text, begin) : nullptr;
    if (!s || s->parsed) return;
    encode(text.substr(done, begin - done), {});
    ids.push_back(s->id);
    done = begin + s->text.size();
  });
  encode(text.substr(done), {});
  return ids;
}

std::vector<int32_t> ChatEncoder::Encode(const Json& messages, bool add_generation_prompt) const {
  bool injected = false;
  std::set<uint32_t> used;
  ForEachString(messages, [&](const std::string& text) {
    injected |= HasSpecial(text);
    ForEachCharacter(text, [&](uint32_t c, size_t, size_t) {
      if (c >= kFirstPrivate && c <= kLastPrivate) used.insert(c);
    });
  });
  const ChatOptions options{.add_generation_prompt = add_generation_prompt};
  if (!injected) return EncodeRendered(chat_.Render(messages, options), 0);
  char32_t base = kFirstPrivate;  // of a run of characters that no message has
  for (const uint32_t c : used) {
    if (c < base + specials_.size()) base = c + 1;
  }
  if (base + specials_.size() > kLastPrivate) {
    Fail("data.chat", "the messages have too many private-use characters");
  }
  Json disguised = messages;
  DisguiseAll(disguised, base);
  return EncodeRendered(chat_.Render(disguised, options), base);
}

std::optional<int32_t> ChatEncoder::EndOfTurn() const {
  const std::string answer = "detour";
  std::string text;
  try {
    text = chat_.Render(
        {{{"role", "user"}, {"content", "?"}}, {{"role", "assistant"}, {"content", answer}}});
  } catch (const Error&) {
    return std::nullopt;  // a template that wants more than that will say so when it is used
  }
  const size_t at = text.rfind(answer);
  if (at == std::string::npos) return std::nullopt;
  std::string_view tail = std::string_view(text).substr(at + answer.size());
  tail.remove_prefix(std::min(tail.find_first_not_of(" \t\r\n"), tail.size()));
  if (const Special* s = tail.empty() ? nullptr : Find(tail, 0)) return s->id;
  tail = tail.substr(0, tail.find_last_not_of(" \t\r\n") + 1);
  return tail.empty() ? std::nullopt : tokenizer_.TokenId(tail);
}

}  // namespace detour::data
