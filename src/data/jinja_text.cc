#include "data/jinja_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "data/utf8.h"

namespace detour::data::jinja {
namespace {

uint32_t CodeAt(std::string_view text, size_t at, size_t* length) {
  *length = ReadUtf8Head(text.substr(at)).length;
  return DecodeUtf8(text.substr(at), static_cast<int>(*length));
}

// The begin of the last character of text[0, end).
size_t Previous(std::string_view text, size_t end) {
  size_t begin = end - 1;
  while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
  return begin;
}

// Length of the line end at text[at], 0 if there is none.
size_t LineEnd(std::string_view text, size_t at) {
  const uint8_t c = text[at];
  if (c == '\r') return at + 1 < text.size() && text[at + 1] == '\n' ? 2 : 1;
  if (c == '\n' || c == '\v' || c == '\f' || (c >= 0x1C && c <= 0x1E)) return 1;
  if (c < 0x80) return 0;
  size_t length = 0;
  const uint32_t code = CodeAt(text, at, &length);
  return code == 0x85 || code == 0x2028 || code == 0x2029 ? length : 0;
}

}  // namespace

bool IsSpace(uint32_t c) {
  if (c < 0x80) return (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x20);
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

size_t SpacePrefix(std::string_view text) {
  size_t at = 0, length = 0;
  while (at < text.size() && IsSpace(CodeAt(text, at, &length))) at += length;
  return at;
}

size_t SpaceSuffix(std::string_view text) {
  size_t end = text.size(), length = 0;
  while (end > 0 && IsSpace(CodeAt(text, Previous(text, end), &length))) end -= length;
  return text.size() - end;
}

bool IsAscii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<uint8_t>(c) < 0x80; });
}

int64_t CountCodePoints(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<uint8_t>(c) & 0xC0) != 0x80; });
}

size_t ByteOffset(std::string_view text, int64_t index) {
  size_t at = 0;
  for (; at < text.size(); ++at) {
    if ((static_cast<uint8_t>(text[at]) & 0xC0) != 0x80 && index-- == 0) break;
  }
  return at;
}

std::string_view Strip(std::string_view text, const std::optional<std::string_view>& chars,
                       bool begin, bool end) {
  if (!chars) {
    if (begin) text.remove_prefix(SpacePrefix(text));
    if (end) text.remove_suffix(SpaceSuffix(text));
    return text;
  }
  std::vector<uint32_t> set;
  size_t length = 0;
  for (size_t at = 0; at < chars->size(); at += length) set.push_back(CodeAt(*chars, at, &length));
  std::sort(set.begin(), set.end());
  const auto strip = [&](uint32_t code) {
    return std::binary_search(set.begin(), set.end(), code);
  };
  while (begin && !text.empty() && strip(CodeAt(text, 0, &length))) text.remove_prefix(length);
  while (end && !text.empty() && strip(CodeAt(text, Previous(text, text.size()), &length))) {
    text.remove_suffix(length);
  }
  return text;
}

std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t length = LineEnd(text, at);
    if (length == 0) {
      ++at;
      // Only the first byte of a character can begin a line end.
      while (at < text.size() && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) ++at;
      continue;
    }
    lines.push_back(text.substr(begin, at - begin + (keep_ends ? length : 0)));
    begin = at += length;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

namespace {

std::vector<std::string_view> SplitSpace(std::string_view text, int64_t max_splits,
                                         bool from_right) {
  std::vector<std::string_view> parts;
  while (true) {
    text = Strip(text, std::nullopt, !from_right, from_right);
    if (text.empty()) return parts;
    if (max_splits >= 0 && static_cast<int64_t>(parts.size()) >= max_splits) {
      parts.push_back(text);  // with the space on its far side
      return parts;
    }
    size_t length = 0;
    if (from_right) {
      size_t begin = text.size();
      while (begin > 0 && !IsSpace(CodeAt(text, Previous(text, begin), &length))) begin -= length;
      parts.push_back(text.substr(begin));
      text = text.substr(0, begin);
    } else {
      size_t end = 0;
      while (end < text.size() && !IsSpace(CodeAt(text, end, &length))) end += length;
      parts.push_back(text.substr(0, end));
      text = text.substr(end);
    }
  }
}

}  // namespace

std::vector<std::string_view> Split(std::string_view text,
                                    const std::optional<std::string_view>& separator,
                                    int64_t max_splits, bool from_right) {
  std::vector<std::string_view> parts;
  if (!separator) {
    parts = SplitSpace(text, max_splits, from_right);
  } else {
    while (max_splits < 0 || static_cast<int64_t>(parts.size()) < max_splits) {
      const size_t at = from_right ? text.rfind(*separator) : text.find(*separator);
      if (at == text.npos) break;
      const std::string_view before = text.substr(0, at),
                             after = text.substr(at + separator->size());
      parts.push_back(from_right ? after : before);
      text = from_right ? before : after;
    }
    parts.push_back(text);
  }
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

std::optional<std::string> Replace(std::string_view text, std::string_view old,
                                   std::string_view replacement, int64_t count, size_t max_bytes) {
  std::string out;
  size_t at = 0;
  const auto add = [&](std::string_view part) {
    if (part.size() > max_bytes - out.size()) return false;
    out += part;
    return true;
  };
  while (count != 0) {
    if (old.empty()) {  // before every character and at the end
      if (!add(replacement)) return std::nullopt;
      if (at == text.size()) return out;
      const size_t length = ReadUtf8Head(text.substr(at)).length;
      if (!add(text.substr(at, length))) return std::nullopt;
      at += length;
    } else {
      const size_t found = text.find(old, at);
      if (found == text.npos) break;
      if (!add(text.substr(at, found - at)) || !add(replacement)) return std::nullopt;
      at = found + old.size();
    }
    if (count > 0) --count;
  }
  if (!add(text.substr(at))) return std::nullopt;
  return out;
}

namespace {

// Takes the underscores between digits out; absent if one is elsewhere.
std::optional<std::string> WithoutUnderscores(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      out += text[i];
      continue;
    }
    const auto is_alnum = [](char c) {
      return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z');
    };
    if (i == 0 || i + 1 == text.size() || !is_alnum(text[i - 1]) || !is_alnum(text[i + 1])) {
      return std::nullopt;
    }
  }
  return out;
}

}  // namespace

std::optional<int64_t> ParsePythonInt(std::string_view text, int base, bool* overflow) {
  *overflow = false;
  text = Strip(text, std::nullopt, true, true);
  bool negative = false;
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) {
    negative = text[0] == '-';
    text.remove_prefix(1);
  }
  const char kind = text.size() > 1 && text[0] == '0' ? static_cast<char>(text[1] | 0x20) : '\0';
  const int prefix_base = kind == 'x' ? 16 : kind == 'o' ? 8 : kind == 'b' ? 2 : 0;
  bool prefixed = false;
  if (prefix_base != 0 && (base == 0 || base == prefix_base)) {
    base = prefix_base;
    text.remove_prefix(2);
    prefixed = true;
    if (!text.empty() && text[0] == '_') text.remove_prefix(1);
  }
  const std::optional<std::string> digits = WithoutUnderscores(text);
  if (!digits || digits->empty()) return std::nullopt;
  if (base == 0) {  // leading zeros are for zero alone
    base = 10;
    if (!prefixed && (*digits)[0] == '0' && digits->find_first_not_of('0') != std::string::npos) {
      return std::nullopt;
    }
  }
  // from_chars takes a sign of its own.
  if ((*digits)[0] == '-') return std::nullopt;
  const std::string number = fmt::format("{}{}", negative ? "-" : "", *digits);
  int64_t value = 0;
  const auto result = std::from_chars(number.data(), number.data() + number.size(), value, base);
  if (result.ptr != number.data() + number.size()) return std::nullopt;
  *overflow = result.ec == std::errc::result_out_of_range;
  if (result.ec != std::errc()) return std::nullopt;
  return value;
}

std::optional<double> ParsePythonFloat(std::string_view text) {
  text = Strip(text, std::nullopt, true, true);
  const std::optional<std::string> plain = WithoutUnderscores(text);
  if (!plain) return std::nullopt;
  std::string_view number = *plain;
  bool negative = false;
  if (!number.empty() && (number[0] == '-' || number[0] == '+')) {
    negative = number[0] == '-';
    number.remove_prefix(1);
  }
  std::string lower(number.substr(0, 9));
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c |= 0x20;
  }
  double value = 0;
  if (lower == "inf" || lower == "infinity") {
    value = std::numeric_limits<double>::infinity();
  } else if (lower == "nan") {
    value = std::numeric_limits<double>::quiet_NaN();
  } else {
    if (number.empty() || !((number[0] >= '0' && number[0] <= '9') || number[0] == '.')) {
      return std::nullopt;
    }
    const auto result = std::from_chars(number.data(), number.data() + number.size(), value);
    if (result.ptr != number.data() + number.size()) return std::nullopt;
    if (result.ec == std::errc::result_out_of_range) {
      // Too large or too small: the digits say which, as strtod does.
      value = std::strtod(std::string(number).c_str(), nullptr);
    } else if (result.ec != std::errc()) {
      return std::nullopt;
    }
  }
  return negative ? -value : value;
}

std::string FloatRepr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[40];
  const auto end =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific).ptr;
  const std::string_view text(buffer, end - buffer);
  const size_t e = text.find('e');
  int exponent = 0;
  std::from_chars(text.data() + e + (text[e + 1] == '+' ? 2 : 1), text.data() + text.size(),
                  exponent);
  std::string digits(text.substr(0, e));
  const bool negative = digits[0] == '-';
  std::erase_if(digits, [](char c) { return c == '.' || c == '-'; });
  const int count = static_cast<int>(digits.size());
  if (exponent < -4 || exponent >= 16) {
    if (count > 1) digits.insert(digits.begin() + 1, '.');
    digits += fmt::format("e{}{:02}", exponent < 0 ? '-' : '+', std::abs(exponent));
  } else if (exponent < 0) {
    digits = fmt::format("0.{:0>{}}", digits, count - exponent - 1);
  } else if (count <= exponent + 1) {
    digits += std::string(exponent + 1 - count, '0') + ".0";
  } else {
    digits.insert(digits.begin() + exponent + 1, '.');
  }
  return fmt::format("{}{}", negative ? "-" : "", digits);
}

std::string JsonString(std::string_view text, bool ensure_ascii) {
  std::string out = "\"";
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    static constexpr std::string_view kSpecial = "\"\\\n\r\t\f\b", kLetters = "\"\\nrtfb";
    if (const size_t found = kSpecial.find(c); found != kSpecial.npos) {
      out += '\\';
      out += kLetters[found];
    } else if (static_cast<uint8_t>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<uint8_t>(c));
    } else if (static_cast<uint8_t>(c) >= 0x80 && ensure_ascii) {
      size_t length = 0;
      uint32_t code = CodeAt(text, at, &length);
      if (code >= 0x10000) {
        code -= 0x10000;
        out += fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + (code >> 10), 0xDC00 + (code & 0x3FF));
      } else {
        out += fmt::format("\\u{:04x}", code);
      }
      at += length;
      continue;
    } else {
      out += c;
    }
    ++at;
  }
  return out + '"';
}

}  // namespace detour::data::jinja
