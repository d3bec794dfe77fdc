#include "core/json.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <unordered_set>

namespace detour {
namespace {

// The parser does not tell a handler where it is: this iterator does.
class TrackedIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  TrackedIterator(const char* at, size_t* consumed) : at_(at), consumed_(consumed) {}
  reference operator*() const { return *at_; }
  TrackedIterator& operator++() {
    ++at_;
    ++*consumed_;
    return *this;
  }
  bool operator==(const TrackedIterator& other) const { return at_ == other.at_; }
  bool operator!=(const TrackedIterator& other) const { return at_ != other.at_; }

 private:
  const char* at_;
  size_t* consumed_;
};

// Builds the value from the parser's events; the parser itself keeps its state on the heap and
// never recurses.
class Builder : public nlohmann::json_sax<Json> {
 public:
  Builder(std::string_view text, const std::string& name, int max_depth, int64_t max_values)
      : text_(text), name_(name), max_depth_(max_depth), values_left_(max_values) {}

  Json Build() {
    size_t unused = 0;
    Json::sax_parse(TrackedIterator(text_.data(), &consumed_),
                    TrackedIterator(text_.data() + text_.size(), &unused), this);
    return std::move(root_);
  }

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t&) override { return Add(value); }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return false; }  // not in JSON text
  bool start_object(std::size_t) override {
    Open(Json::object());
    return true;
  }
  bool start_array(std::size_t) override {
    Open(Json::array());
    return true;
  }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& key) override {
    if (!open_.back().keys.insert(key).second) FailHere("key \"{}\" occurs twice", Printable(key));
    key_ = std::move(key);
    return true;
  }

  bool parse_error(std::size_t, const std::string&,
                   const nlohmann::detail::exception& error) override {
    // "[json.exception.…] parse error at line 1, column 2: what": the place is ours to say.
    std::string_view what = error.what();
    what = what.substr(what.find(']') + 2);
    if (const size_t place_end = what.find(": "); place_end < 60) what = what.substr(place_end + 2);
    FailHere("{}", Printable(what, 200));
  }

 private:
  struct Level {
    Json* value;
    std::unordered_set<std::string> keys;
  };

  template <typename... Args>
  [[noreturn]] void FailHere(fmt::format_string<Args...> format, Args&&... args) const {
    const size_t at = std::min(consumed_, text_.size());
    const auto line = 1 + std::count(text_.begin(), text_.begin() + at, '\n');
    Fail("json", "{}: line {}, byte {}: {}", name_, line, at,
         fmt::format(format, std::forward<Args>(args)...));
  }

  // Parents do not grow while a child is open, so the pointers in open_ stay valid.
  Json* Place(Json&& value) {
    if (--values_left_ < 0) FailHere("too many values");
    if (open_.empty()) return &(root_ = std::move(value));
    Json& parent = *open_.back().value;
    if (parent.is_array()) {
      return &parent.get_ref<Json::array_t&>().emplace_back(std::move(value));
    }
    // Past ordered_map's own emplace: that one searches all keys, key() has done so in O(1).
    auto& object =
        static_cast<std::vector<Json::object_t::value_type>&>(parent.get_ref<Json::object_t&>());
    return &object.emplace_back(std::move(key_), std::move(value)).second;
  }
  bool Add(Json&& value) {
    Place(std::move(value));
    return true;
  }
  void Open(Json&& value) {
    if (static_cast<int>(open_.size()) >= max_depth_) {
      FailHere("nested deeper than {} levels", max_depth_);
    }
    Json* placed = Place(std::move(value));
    open_.push_back({placed, {}});
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  std::string_view text_;
  const std::string& name_;
  int max_depth_;
  int64_t values_left_;
  size_t consumed_ = 0;
  Json root_;
  std::vector<Level> open_;
  std::string key_;
};

const Json* Find(const Json& object, std::string_view key, const std::string& name) {
  if (!object.is_object()) {
    Fail("json", "{}: expected an object with \"{}\", got {}", name, key, object.type_name());
  }
  const auto it = object.find(key);
  return it == object.end() ? nullptr : &*it;
}

const Json& Require(const Json& object, std::string_view key, const std::string& name) {
  const Json* value = Find(object, key, name);
  if (value == nullptr) Fail("json", "{}: \"{}\" is missing", name, key);
  return *value;
}

std::string Show(const Json& value) {
  if (value.is_object() || value.is_array()) return value.type_name();
  return Printable(value.dump(-1, ' ', false, Json::error_handler_t::replace), 40);
}

[[noreturn]] void FailType(const Json& value, std::string_view key, const std::string& name,
                           std::string_view expected) {
  Fail("json", "{}: \"{}\": expected {}, got {}", name, key, expected, Show(value));
}

int64_t ToInt(const Json& value, std::string_view key, const std::string& name, int64_t min,
              int64_t max) {
  if (!value.is_number_integer()) FailType(value, key, name, "an integer");
  const bool too_large =
      value.is_number_unsigned() &&
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (too_large || value.get<int64_t>() < min || value.get<int64_t>() > max) {
    FailType(value, key, name, fmt::format("an integer in [{}, {}]", min, max));
  }
  return value.get<int64_t>();
}

// Levenshtein distance.
size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replace = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replace, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

}  // namespace

Json ParseJson(std::string_view text, const std::string& name, int max_depth, int64_t max_values) {
  // The library takes a zero byte for the end of the text.
  if (const size_t zero = text.find('\0'); zero != text.npos) {
    Fail("json", "{}: byte {}: a zero byte is not JSON text", name, zero);
  }
  return Builder(text, name, max_depth, max_values).Build();
}

std::string Printable(std::string_view text, size_t max_bytes) {
  std::string out;
  for (const unsigned char c : text.substr(0, max_bytes)) {
    if (c >= 0x20 && c < 0x7f) {
      out += static_cast<char>(c);
    } else {
      out += fmt::format("\\x{:02x}", c);
    }
  }
  if (text.size() > max_bytes) out += "...";
  return out;
}

int64_t GetInt(const Json& object, std::string_view key, const std::string& name, int64_t min,
               int64_t max) {
  return ToInt(Require(object, key, name), key, name, min, max);
}

double GetDouble(const Json& object, std::string_view key, const std::string& name, double min,
                 double max) {
  const Json& value = Require(object, key, name);
  if (!value.is_number()) FailType(value, key, name, "a number");
  const double number = value.get<double>();
  if (!(number >= min && number <= max)) {
    FailType(value, key, name, fmt::format("a number in [{}, {}]", min, max));
  }
  return number;
}

bool GetBool(const Json& object, std::string_view key, const std::string& name) {
  const Json& value = Require(object, key, name);
  if (!value.is_boolean()) FailType(value, key, name, "true or false");
  return value.get<bool>();
}

std::string GetString(const Json& object, std::string_view key, const std::string& name) {
  const Json& value = Require(object, key, name);
  if (!value.is_string()) FailType(value, key, name, "a string");
  return value.get<std::string>();
}

std::vector<int64_t> GetInts(const Json& object, std::string_view key, const std::string& name,
                             int64_t min, int64_t max) {
  const Json& value = Require(object, key, name);
  if (!value.is_array()) FailType(value, key, name, "a list of integers");
  std::vector<int64_t> out;
  for (const Json& element : value) out.push_back(ToInt(element, key, name, min, max));
  return out;
}

int64_t GetIntOr(const Json& object, std::string_view key, const std::string& name,
                 int64_t fallback, int64_t min, int64_t max) {
  return HasKey(object, key, name) ? GetInt(object, key, name, min, max) : fallback;
}

double GetDoubleOr(const Json& object, std::string_view key, const std::string& name,
                   double fallback, double min, double max) {
  return HasKey(object, key, name) ? GetDouble(object, key, name, min, max) : fallback;
}

bool GetBoolOr(const Json& object, std::string_view key, const std::string& name, bool fallback) {
  return HasKey(object, key, name) ? GetBool(object, key, name) : fallback;
}

std::string GetStringOr(const Json& object, std::string_view key, const std::string& name,
                        const std::string& fallback) {
  return HasKey(object, key, name) ? GetString(object, key, name) : fallback;
}

bool HasKey(const Json& object, std::string_view key, const std::string& name) {
  const Json* value = Find(object, key, name);
  return value != nullptr && !value->is_null();
}

void CheckKnownKeys(const Json& object, std::span<const std::string_view> known,
                    const std::string& name) {
  if (!object.is_object()) {
    Fail("json", "{}: expected an object, got {}", name, object.type_name());
  }
  for (const auto& [key, value] : object.items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    const std::string_view start = std::string_view(key).substr(0, 64);  // bounds the search
    std::string_view nearest;
    size_t distance = start.size() / 2 + 1;
    for (const std::string_view candidate : known) {
      const size_t d = EditDistance(start, candidate);
      if (d < distance) {
        distance = d;
        nearest = candidate;
      }
    }
    if (nearest.empty()) {
      Fail("json", "{}: unknown key \"{}\". Hint: known keys are {}", name, Printable(key),
           fmt::join(known, ", "));
    }
    Fail("json", "{}: unknown key \"{}\". Hint: did you mean \"{}\"?", name, Printable(key),
         nearest);
  }
}

}  // namespace detour
