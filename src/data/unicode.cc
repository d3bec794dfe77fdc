#include "data/unicode.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/stringpiece.h>
#include <unicode/uchar.h>
#include <unicode/uniset.h>

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace detour::data {
namespace {

constexpr size_t kMaxNormalizeBytes = size_t{1} << 30;  // ICU counts in int32

enum Kind : uint8_t { kLu, kLl, kLm, kLo, kHan, kM, kNd, kNo, kP, kS };

// By kind: a character of Unicode 14 that takes three bytes of UTF-8, and one that takes four.
constexpr uint32_t kOld[][2] = {
    {0x1C90, 0x10400}, {0x1D00, 0x10428}, {0x1D2C, 0x10780}, {0x1401, 0x10280}, {0x4DB5, 0x2A6D6},
    {0x0A01, 0x10A01}, {0x0DE6, 0x104A0}, {0x2460, 0x10107}, {0x1400, 0x10100}, {0x2400, 0x1FA70}};

struct NewRange {
  uint32_t first, last;
  Kind kind;
};
// Characters of Unicode 15 and 16 with a category that patterns ask for.
constexpr NewRange kNew[] = {
    {0x0897, 0x0897, kM},    {0x0CF3, 0x0CF3, kM},     {0x0ECE, 0x0ECE, kM},
    {0x1B4E, 0x1B4F, kP},    {0x1B7F, 0x1B7F, kP},     {0x1C89, 0x1C89, kLu},
    {0x1C8A, 0x1C8A, kLl},   {0x2427, 0x2429, kS},     {0x2FFC, 0x2FFF, kS},
    {0x31E4, 0x31E5, kS},    {0x31EF, 0x31EF, kS},     {0xA7CB, 0xA7CC, kLu},
    {0xA7CD, 0xA7CD, kLl},   {0xA7DA, 0xA7DA, kLu},    {0xA7DB, 0xA7DB, kLl},
    {0xA7DC, 0xA7DC, kLu},   {0x105C0, 0x105F3, kLo},  {0x10D40, 0x10D49, kNd},
    {0x10D4A, 0x10D4D, kLo}, {0x10D4E, 0x10D4E, kLm},  {0x10D4F, 0x10D4F, kLo},
    {0x10D50, 0x10D65, kLu}, {0x10D69, 0x10D6D, kM},   {0x10D6E, 0x10D6E, kP},
    {0x10D6F, 0x10D6F, kLm}, {0x10D70, 0x10D85, kLl},  {0x10D8E, 0x10D8F, kS},
    {0x10EC2, 0x10EC4, kLo}, {0x10EFC, 0x10EFF, kM},   {0x1123F, 0x11240, kLo},
    {0x11241, 0x11241, kM},  {0x11380, 0x11389, kLo},  {0x1138B, 0x1138B, kLo},
    {0x1138E, 0x1138E, kLo}, {0x11390, 0x113B5, kLo},  {0x113B7, 0x113B7, kLo},
    {0x113B8, 0x113C0, kM},  {0x113C2, 0x113C2, kM},   {0x113C5, 0x113C5, kM},
    {0x113C7, 0x113CA, kM},  {0x113CC, 0x113D0, kM},   {0x113D1, 0x113D1, kLo},
    {0x113D2, 0x113D2, kM},  {0x113D3, 0x113D3, kLo},  {0x113D4, 0x113D5, kP},
    {0x113D7, 0x113D8, kP},  {0x113E1, 0x113E2, kM},   {0x116D0, 0x116E3, kNd},
    {0x11B00, 0x11B09, kP},  {0x11BC0, 0x11BE0, kLo},  {0x11BE1, 0x11BE1, kP},
    {0x11BF0, 0x11BF9, kNd}, {0x11F00, 0x11F01, kM},   {0x11F02, 0x11F02, kLo},
    {0x11F03, 0x11F03, kM},  {0x11F04, 0x11F10, kLo},  {0x11F12, 0x11F33, kLo},
    {0x11F34, 0x11F3A, kM},  {0x11F3E, 0x11F42, kM},   {0x11F43, 0x11F4F, kP},
    {0x11F50, 0x11F59, kNd}, {0x11F5A, 0x11F5A, kM},   {0x1342F, 0x1342F, kLo},
    {0x13440, 0x13440, kM},  {0x13441, 0x13446, kLo},  {0x13447, 0x13455, kM},
    {0x13460, 0x143FA, kLo}, {0x16100, 0x1611D, kLo},  {0x1611E, 0x1612F, kM},
    {0x16130, 0x16139, kNd}, {0x16D40, 0x16D42, kLm},  {0x16D43, 0x16D6A, kLo},
    {0x16D6B, 0x16D6C, kLm}, {0x16D6D, 0x16D6F, kP},   {0x16D70, 0x16D79, kNd},
    {0x18CFF, 0x18CFF, kLo}, {0x1B132, 0x1B132, kLo},  {0x1B155, 0x1B155, kLo},
    {0x1CC00, 0x1CCEF, kS},  {0x1CCF0, 0x1CCF9, kNd},  {0x1CD00, 0x1CEB3, kS},
    {0x1D2C0, 0x1D2D3, kNo}, {0x1DF25, 0x1DF2A, kLl},  {0x1E030, 0x1E06D, kLm},
    {0x1E08F, 0x1E08F, kM},  {0x1E4D0, 0x1E4EA, kLo},  {0x1E4EB, 0x1E4EB, kLm},
    {0x1E4EC, 0x1E4EF, kM},  {0x1E4F0, 0x1E4F9, kNd},  {0x1E5D0, 0x1E5ED, kLo},
    {0x1E5EE, 0x1E5EF, kM},  {0x1E5F0, 0x1E5F0, kLo},  {0x1E5F1, 0x1E5FA, kNd},
    {0x1E5FF, 0x1E5FF, kP},  {0x1F6DC, 0x1F6DC, kS},   {0x1F774, 0x1F776, kS},
    {0x1F77B, 0x1F77F, kS},  {0x1F7D9, 0x1F7D9, kS},   {0x1F8B2, 0x1F8BB, kS},
    {0x1F8C0, 0x1F8C1, kS},  {0x1FA75, 0x1FA77, kS},   {0x1FA87, 0x1FA89, kS},
    {0x1FA8F, 0x1FA8F, kS},  {0x1FAAD, 0x1FAAF, kS},   {0x1FABB, 0x1FABF, kS},
    {0x1FAC6, 0x1FAC6, kS},  {0x1FACE, 0x1FACF, kS},   {0x1FADA, 0x1FADC, kS},
    {0x1FADF, 0x1FADF, kS},  {0x1FAE8, 0x1FAE9, kS},   {0x1FAF7, 0x1FAF8, kS},
    {0x1FBCB, 0x1FBEF, kS},  {0x2B739, 0x2B739, kHan}, {0x2EBF0, 0x2EE5D, kHan},
    {0x31350, 0x323AF, kHan}};

const NewRange* FindNew(uint32_t c) {
  const NewRange* range =
      std::lower_bound(std::begin(kNew), std::end(kNew), c,
                       [](const NewRange& range, uint32_t value) { return range.last < value; });
  return range != std::end(kNew) && range->first <= c ? range : nullptr;
}

/// The old character that stands for `c`, or `c` itself.
uint32_t OldCharacter(uint32_t c) {
  const NewRange* range = FindNew(c);
  return range == nullptr ? c : kOld[range->kind][c > 0xFFFF];
}

bool IsAscii(std::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return static_cast<uint8_t>(c) < 0x80; });
}

bool IsNoLaterThan(uint32_t c, int version) {
  UVersionInfo age;
  u_charAge(static_cast<UChar32>(c), age);
  return age[0] <= version;
}

void Check(UErrorCode status) { DETOUR_CHECK(U_SUCCESS(status), "ICU: {}", u_errorName(status)); }

const icu::Normalizer2& Icu(NormalForm form) {
  static const auto make = [](const char* data, UNormalization2Mode mode) {
    UErrorCode status = U_ZERO_ERROR;
    static const icu::UnicodeSet* known = [] {
      UErrorCode error = U_ZERO_ERROR;
      auto* set = new icu::UnicodeSet(icu::UnicodeString("[:age=9.0:]"), error);
      Check(error);
      return set->freeze();
    }();
    const auto* all = icu::Normalizer2::getInstance(nullptr, data, mode, status);
    Check(status);
    return new icu::FilteredNormalizer2(*all, *known);
  };
  // Never freed: a tokenizer may outlive the statics of this file.
  static const icu::FilteredNormalizer2* forms[] = {
      make("nfc", UNORM2_COMPOSE), make("nfc", UNORM2_DECOMPOSE), make("nfkc", UNORM2_COMPOSE),
      make("nfkc", UNORM2_DECOMPOSE)};
  return *forms[static_cast<int>(form)];
}

}  // namespace

bool IsWhiteSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool IsNumeric(uint32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  if ((c >= 0x11DE0 && c <= 0x11DE9) || (c >= 0x16FF4 && c <= 0x16FF6)) return true;  // Unicode 17
  return (U_GET_GC_MASK(static_cast<UChar32>(OldCharacter(c))) & U_GC_N_MASK) != 0;
}

bool IsPunctuation(uint32_t c) {
  if (c < 0x80) return c > 0x20 && c < 0x7F && !u_isalnum(static_cast<UChar32>(c));
  if (c == 0x166D || c == 0x111C9) return true;  // of another category since
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_P_MASK) != 0 && IsNoLaterThan(c, 8);
}

bool IsCombiningMark(uint32_t c) {
  if (c < 0x300) return false;
  if (c == 0x1CF2 || c == 0x1CF3) return true;  // of another category since
  return (U_GET_GC_MASK(static_cast<UChar32>(c)) & U_GC_M_MASK) != 0 && IsNoLaterThan(c, 9) &&
         c != 0x111C9;
}

bool IsWordCharacter(uint32_t c) {
  const auto old = static_cast<UChar32>(OldCharacter(c));
  return u_hasBinaryProperty(old, UCHAR_ALPHABETIC) ||
         u_hasBinaryProperty(old, UCHAR_JOIN_CONTROL) ||
         (U_GET_GC_MASK(old) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0;
}

std::string Normalize(NormalForm form, std::string_view text) {
  std::string out;
  if (IsAscii(text)) return std::string(text);
  if (text.size() > kMaxNormalizeBytes) {
    Fail("data.tokenizer", "a text of {} bytes: at most {} are normalized at once", text.size(),
         kMaxNormalizeBytes);
  }
  out.reserve(text.size() + text.size() / 8);
  icu::StringByteSink<std::string> sink(&out);
  UErrorCode status = U_ZERO_ERROR;
  Icu(form).normalizeUTF8(0, icu::StringPiece(text.data(), static_cast<int32_t>(text.size())), sink,
                          nullptr, status);
  Check(status);
  return out;
}

std::string Lowercase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  ForEachCharacter(text, [&](uint32_t c, size_t, size_t) {
    if (c < 0x80) {
      out.push_back(static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c));
      return;
    }
    if (c == 0x130) {
      out += "i\u0307";
      return;
    }
    uint32_t lower = static_cast<uint32_t>(u_tolower(static_cast<UChar32>(c)));
    // Unicode 16 and 17.
    if (c == 0x1C89 || c == 0xA7CC || c == 0xA7CE || c == 0xA7D2 || c == 0xA7D4 || c == 0xA7DA)
      lower = c + 1;
    if (c == 0xA7CB) lower = 0x264;
    if (c == 0xA7DC) lower = 0x19B;
    if (c >= 0x10D50 && c <= 0x10D65) lower = c + 0x20;
    if (c >= 0x16EA0 && c <= 0x16EB8) lower = c + 0x1B;
    AppendUtf8(lower, &out);
  });
  return out;
}

bool HasNewCharacter(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    uint64_t word;
    while (i + sizeof(word) <= text.size()) {
      std::memcpy(&word, text.data() + i, sizeof(word));
      if (word & 0x8080808080808080u) break;
      i += sizeof(word);
    }
    // Of three bytes, only some that begin with these are new.
    for (size_t end = std::min(text.size(), i + sizeof(word)); i < end; ++i) {
      const uint8_t lead = static_cast<uint8_t>(text[i]);
      if (lead < 0xE0 || (lead > 0xE3 && lead < 0xEA) || (lead > 0xEA && lead < 0xF0)) continue;
      if (FindNew(DecodeUtf8(text.substr(i), lead < 0xF0 ? 3 : 4)) != nullptr) return true;
    }
  }
  return false;
}

std::string ReplaceNewCharacters(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  ForEachCharacter(text, [&](uint32_t c, size_t, size_t) { AppendUtf8(OldCharacter(c), &out); });
  return out;
}

}  // namespace detour::data
