#include "data/utf8_stream.h"

#include "data/utf8.h"

namespace detour::data {
namespace {
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";
}

std::string Utf8Stream::Push(std::string_view bytes) {
  pending_ += bytes;
  std::string_view rest = pending_;
  std::string text;
  while (!rest.empty()) {
    const size_t valid = ValidUtf8Prefix(rest);
    text += rest.substr(0, valid);
    rest.remove_prefix(valid);
    if (rest.empty()) break;
    const Utf8Head head = ReadUtf8Head(rest);
    if (head.kind == Utf8Kind::kIncomplete) break;
    text += kReplacement;
    rest.remove_prefix(head.length);
  }
  pending_ = std::string(rest);
  return text;
}

std::string Utf8Stream::Flush() {
  std::string text(pending_.empty() ? "" : kReplacement);
  pending_.clear();
  return text;
}

}  // namespace detour::data
