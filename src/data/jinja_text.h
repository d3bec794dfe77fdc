// Python's functions on text and numbers: str methods, int(), float(), repr(). Text is UTF-8.
// All are linear in the text, the ones that ask for properties of characters with a larger factor
// where the text is not ASCII.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace detour::data::jinja {

/// str.isspace of one code point.
bool IsSpace(uint32_t code_point);
/// Bytes of white space at the begin or the end.
size_t SpacePrefix(std::string_view text);
size_t SpaceSuffix(std::string_view text);

bool IsAscii(std::string_view text);
/// Code points.
int64_t CountCodePoints(std::string_view text);
/// The byte where code point number `index` begins; the size for what lies behind the end.
size_t ByteOffset(std::string_view text, int64_t index);

/// str.upper, lower, title, capitalize with Unicode 14's full mappings.
std::string ToUpper(std::string_view text);
std::string ToLower(std::string_view text);
std::string ToTitle(std::string_view text);
std::string Capitalize(std::string_view text);
/// Jinja's title filter: every part after a space or one of -({[< begins with a capital.
std::string TitleFilter(std::string_view text);

enum class Property { kAlpha, kAlnum, kDecimal, kDigit, kNumeric, kLower, kUpper, kSpace };
/// str.isalpha and so on. Absent where Unicode's tables would be needed that nothing here has.
std::optional<bool> Has(Property property, std::string_view text);

/// str.strip: `chars` (absent: white space) taken off the begin and the end.
std::string_view Strip(std::string_view text, const std::optional<std::string_view>& chars,
                       bool begin, bool end);
/// str.splitlines.
std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends);
/// str.split and rsplit; `separator` (absent: white space) is not empty; max_splits < 0: all.
std::vector<std::string_view> Split(std::string_view text,
                                    const std::optional<std::string_view>& separator,
                                    int64_t max_splits, bool from_right);
/// str.replace; count < 0: all. Absent if the result is longer than `max_bytes`.
std::optional<std::string> Replace(std::string_view text, std::string_view old,
                                   std::string_view replacement, int64_t count, size_t max_bytes);

/// int(text, base): absent if it is no integer; `overflow` if it has more than 64 bits.
std::optional<int64_t> ParsePythonInt(std::string_view text, int base, bool* overflow);
/// float(text).
std::optional<double> ParsePythonFloat(std::string_view text);
/// repr of a float: the shortest decimals that read back equal.
std::string FloatRepr(double value);
/// repr of a string, in quotes.
std::string StringRepr(std::string_view text);
/// A JSON string as json.dumps writes it, in quotes.
std::string JsonString(std::string_view text, bool ensure_ascii);

}  // namespace detour::data::jinja
