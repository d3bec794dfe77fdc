// The part of jinja_text.h that needs Unicode's tables: case mappings from a file of our own, other
// properties from PCRE2.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <iterator>

#include "core/error.h"
#include "data/jinja_text.h"
#include "data/utf8.h"

namespace detour::data::jinja {
namespace {

struct Range {
  uint32_t first, last, step;
  int32_t difference;
};
struct Special {
  uint32_t code;
  const char* text;
};
#include "data/unicode_case_tables.inc"

constexpr uint32_t kCapitalSigma = 0x3A3, kFinalSigma = 0x3C2;

// A pattern over UTF-8; PCRE2 10.42 has the tables of Unicode 14.
class Pattern {
 public:
  explicit Pattern(const char* pattern) {
    int code = 0;
    PCRE2_SIZE offset = 0;
    code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED,
                          PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK, &code, &offset, nullptr);
    DETOUR_CHECK(code_ != nullptr, "pattern {}: code {} at {}", pattern, code, offset);
    pcre2_jit_compile(code_, PCRE2_JIT_COMPLETE);
  }
  // The byte where a match begins, or npos.
  size_t Find(std::string_view text, size_t from = 0) const {
    pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
    const int result = pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                   from, PCRE2_NO_UTF_CHECK, data, nullptr);
    const size_t at = result < 0 ? std::string_view::npos : pcre2_get_ovector_pointer(data)[0];
    pcre2_match_data_free(data);
    return at;
  }
  bool In(std::string_view text) const { return Find(text) != std::string_view::npos; }

 private:
  pcre2_code* code_;  // lives as long as the program
};

template <size_t N>
const Range* FindRange(const Range (&ranges)[N], uint32_t code) {
  const Range* range = std::upper_bound(std::begin(ranges), std::end(ranges), code,
                                        [](uint32_t c, const Range& r) { return c < r.first; });
  // Ranges of step 2 interleave with others: a few before this one may hold the code point.
  for (int i = 0; i < 4 && range != std::begin(ranges); ++i) {
    --range;
    if (code <= range->last && (code - range->first) % range->step == 0) return range;
  }
  return nullptr;
}

template <size_t N, size_t M>
bool Map(const Range (&ranges)[N], const Special (&specials)[M], uint32_t code, std::string* out) {
  const Special* special =
      std::lower_bound(std::begin(specials), std::end(specials), code,
                       [](const Special& s, uint32_t c) { return s.code < c; });
  if (special != std::end(specials) && special->code == code) {
    *out += special->text;
    return true;
  }
  const Range* range = FindRange(ranges, code);
  if (range == nullptr) return false;
  AppendUtf8(code + range->difference, out);
  return true;
}

enum class Case { kUpper, kLower, kTitle };

void AppendCase(Case to, uint32_t code, std::string* out) {
  if (code < 0x80) {
    const bool change =
        to == Case::kLower ? code >= 'A' && code <= 'Z' : code >= 'a' && code <= 'z';
    out->push_back(static_cast<char>(change ? code ^ 0x20 : code));
    return;
  }
  bool mapped = false;
  if (to == Case::kTitle) mapped = Map(kTitleRanges, kTitleSpecials, code, out);
  if (!mapped) {
    mapped = to == Case::kLower ? Map(kLowerRanges, kLowerSpecials, code, out)
                                : Map(kUpperRanges, kUpperSpecials, code, out);
  }
  if (!mapped) AppendUtf8(code, out);
}

std::string_view CharAt(std::string_view text, size_t at) {
  return text.substr(at, ReadUtf8Head(text.substr(at)).length);
}
std::string_view CharBefore(std::string_view text, size_t end) {
  size_t begin = end - 1;
  while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
  return text.substr(begin, end - begin);
}
uint32_t Decode(std::string_view character) {
  return DecodeUtf8(character, static_cast<int>(character.size()));
}

bool IsCased(std::string_view character) {
  if (character.size() == 1) return (character[0] | 0x20) >= 'a' && (character[0] | 0x20) <= 'z';
  static const Pattern pattern(R"([\p{Lowercase}\p{Uppercase}\p{Lt}])");
  return pattern.In(character);
}
bool IsCaseIgnorable(std::string_view character) {
  static const Pattern pattern(R"(\p{Case_Ignorable})");
  return pattern.In(character);
}

// Whether the capital sigma at [begin, end) ends a word.
bool IsFinalSigma(std::string_view text, size_t begin, size_t end) {
  std::string_view before;
  while (begin > 0) {
    before = CharBefore(text, begin);
    if (!IsCaseIgnorable(before)) break;
    begin -= before.size();
  }
  if (begin == 0 || !IsCased(before)) return false;
  while (end < text.size()) {
    const std::string_view after = CharAt(text, end);
    if (!IsCaseIgnorable(after)) return !IsCased(after);
    end += after.size();
  }
  return true;
}

// Each character to the case that `choose(index of its byte)` says.
template <typename Choose>
std::string Convert(std::string_view text, Choose choose) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const std::string_view character = CharAt(text, at);
    const uint32_t code = Decode(character);
    const Case to = choose(at, character);
    if (code == kCapitalSigma && to == Case::kLower &&
        IsFinalSigma(text, at, at + character.size())) {
      AppendUtf8(kFinalSigma, &out);
    } else {
      AppendCase(to, code, &out);
    }
    at += character.size();
  }
  return out;
}

}  // namespace

std::string ToUpper(std::string_view text) {
  return Convert(text, [](size_t, std::string_view) { return Case::kUpper; });
}

std::string ToLower(std::string_view text) {
  return Convert(text, [](size_t, std::string_view) { return Case::kLower; });
}

std::string ToTitle(std::string_view text) {
  bool inside = false;
  return Convert(text, [&](size_t, std::string_view character) {
    const bool was_inside = inside;
    inside = IsCased(character);
    return was_inside ? Case::kLower : Case::kTitle;
  });
}

std::string Capitalize(std::string_view text) {
  return Convert(text,
                 [](size_t at, std::string_view) { return at ? Case::kLower : Case::kTitle; });
}

std::string TitleFilter(std::string_view text) {
  // Python splits at the separators, so that a sigma's word ends there.
  std::string out;
  const auto is_separator = [](std::string_view c) {
    return IsSpace(Decode(c)) || (c.size() == 1 && std::string_view("-({[<").find(c) != c.npos);
  };
  for (size_t at = 0; at < text.size();) {
    const std::string_view first = CharAt(text, at);
    if (is_separator(first)) {
      out += first;
      at += first.size();
      continue;
    }
    size_t end = at + first.size();
    while (end < text.size() && !is_separator(CharAt(text, end))) end += CharAt(text, end).size();
    AppendCase(Case::kUpper, Decode(first), &out);
    out += ToLower(text.substr(at + first.size(), end - at - first.size()));
    at = end;
  }
  return out;
}

std::optional<bool> Has(Property property, std::string_view text) {
  static const Pattern alpha(R"(\A\p{L}++\z)"), alnum(R"(\A[\p{L}\p{N}]++\z)"),
      decimal(R"(\A\p{Nd}++\z)"), numeric(R"(\A\p{N}++\z)"), lower(R"(\p{Lowercase})"),
      upper(R"(\p{Uppercase})"), title(R"(\p{Lt})"), other_number(R"(\p{No})"), han(R"(\p{Han})");
  switch (property) {
    case Property::kAlpha:
      return alpha.In(text);
    case Property::kAlnum:
      return alnum.In(text);
    case Property::kDecimal:
      return decimal.In(text);
    case Property::kDigit:  // superscripts are digits, fractions are not
      if (other_number.In(text)) return std::nullopt;
      return decimal.In(text);
    case Property::kNumeric:  // some ideographs are numbers
      if (han.In(text)) return std::nullopt;
      return numeric.In(text);
    case Property::kLower:
      return lower.In(text) && !upper.In(text) && !title.In(text);
    case Property::kUpper:
      return upper.In(text) && !lower.In(text) && !title.In(text);
    case Property::kSpace:
      return !text.empty() && SpacePrefix(text) == text.size();
  }
  return std::nullopt;
}

std::string StringRepr(std::string_view text) {
  static const Pattern unprintable(R"([\p{C}\p{Z}])");
  const bool has_single = text.find('\'') != text.npos;
  const char quote = has_single && text.find('"') == text.npos ? '"' : '\'';
  std::string out(1, quote);
  size_t hidden = IsAscii(text) ? text.npos : unprintable.Find(text);
  for (size_t at = 0; at < text.size();) {
    const std::string_view character = CharAt(text, at);
    const uint32_t code = Decode(character);
    const bool is_hidden = at == hidden && code != ' ';
    if (at == hidden) hidden = unprintable.Find(text, at + character.size());
    at += character.size();
    if (code == '\\' || code == static_cast<uint8_t>(quote)) {
      out += '\\';
      out += static_cast<char>(code);
    } else if (code == '\n' || code == '\r' || code == '\t') {
      out += code == '\n' ? "\\n" : code == '\r' ? "\\r" : "\\t";
    } else if (code < 0x20 || code == 0x7F) {
      out += fmt::format("\\x{:02x}", code);
    } else if (is_hidden) {
      out += code < 0x100     ? fmt::format("\\x{:02x}", code)
             : code < 0x10000 ? fmt::format("\\u{:04x}", code)
                              : fmt::format("\\U{:08x}", code);
    } else {
      out += character;
    }
  }
  return out + quote;
}

}  // namespace detour::data::jinja
