// JSON that comes from outside: parsed with limits, read with checks.
#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"

namespace detour {

/// Objects keep the order of the text. Looking a key up is linear: iterate over large objects
/// (vocabularies).
using Json = nlohmann::ordered_json;

/// Parses one JSON text (RFC 8259; a UTF-8 byte order mark is skipped). Refused: nesting deeper
/// than `max_depth`, more than `max_values` values, a key that occurs twice in an object, invalid
/// UTF-8, anything after the value. Time and memory are linear in the text, for a text that nests
/// too deep in the bytes up to that place. Error("json"): `name` (of the file, say), line, byte
/// offset, and what is wrong there.
Json ParseJson(std::string_view text, const std::string& name, int max_depth = 64,
               int64_t max_values = int64_t{1} << 25);

/// Text from outside for use in a message: one line of printable ASCII, the rest as \xNN, at most
/// `max_bytes` of it.
std::string Printable(std::string_view text, size_t max_bytes = 100);

/// Typed reading of the value at `key`. `name` says in messages where the object is from
/// ("x/config.json", "… routing"). Error("json") if `object` is no object, the key is absent, the
/// type is another or the value is out of [min, max]. An integer is never read from 1.0 or "1"; a
/// double may be written as an integer.
int64_t GetInt(const Json& object, std::string_view key, const std::string& name,
               int64_t min = std::numeric_limits<int64_t>::min(),
               int64_t max = std::numeric_limits<int64_t>::max());
double GetDouble(const Json& object, std::string_view key, const std::string& name,
                 double min = std::numeric_limits<double>::lowest(),
                 double max = std::numeric_limits<double>::max());
bool GetBool(const Json& object, std::string_view key, const std::string& name);
std::string GetString(const Json& object, std::string_view key, const std::string& name);
std::vector<int64_t> GetInts(const Json& object, std::string_view key, const std::string& name,
                             int64_t min = std::numeric_limits<int64_t>::min(),
                             int64_t max = std::numeric_limits<int64_t>::max());

/// The same, but `fallback` where the key is absent or its value is null (transformers writes null
/// for "not set").
int64_t GetIntOr(const Json& object, std::string_view key, const std::string& name,
                 int64_t fallback, int64_t min = std::numeric_limits<int64_t>::min(),
                 int64_t max = std::numeric_limits<int64_t>::max());
double GetDoubleOr(const Json& object, std::string_view key, const std::string& name,
                   double fallback, double min = std::numeric_limits<double>::lowest(),
                   double max = std::numeric_limits<double>::max());
bool GetBoolOr(const Json& object, std::string_view key, const std::string& name, bool fallback);
std::string GetStringOr(const Json& object, std::string_view key, const std::string& name,
                        const std::string& fallback);

/// Whether `key` is there and not null. Error("json") if `object` is no object.
bool HasKey(const Json& object, std::string_view key, const std::string& name);

/// Error("json") if `object` has a key that is not in `known`; the hint is the nearest known one,
/// or all of them.
void CheckKnownKeys(const Json& object, std::span<const std::string_view> known,
                    const std::string& name);

}  // namespace detour
