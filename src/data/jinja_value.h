// The values a template computes with: Python's, immutable but for namespaces. Everything they cost
// is booked on a Budget.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/json.h"
#include "data/jinja.h"
#include "data/jinja_lexer.h"

namespace detour::data::jinja {

/// What a rendering has used, and the line it is at. Not thread-safe.
class Budget {
 public:
  Budget(const Limits& limits, const std::string& name) : limits_(limits), name_(name) {}

  int line = 1;

  /// Error("data.jinja") at this line.
  template <typename... Args>
  [[noreturn]] void Fail(fmt::format_string<Args...> format, Args&&... args) const {
    FailAt(name_, line, format, std::forward<Args>(args)...);
  }

  void Charge(int64_t steps) {
    steps_ += steps;
    if (steps_ > limits_.max_steps) Fail("more than {} steps", limits_.max_steps);
  }
  /// For work on `bytes` of text; `factor` for what is slower than copying.
  void ChargeBytes(size_t bytes, int factor = 1) {
    Charge(1 + static_cast<int64_t>(bytes / 64) * factor);
  }
  /// Before memory is taken.
  void Allocate(int64_t bytes) {
    CheckRoom(bytes);
    memory_bytes_ += bytes;
  }
  void Free(int64_t bytes) { memory_bytes_ -= bytes; }
  void CheckRoom(int64_t bytes) const {
    if (bytes > limits_.max_memory_bytes - memory_bytes_) {
      Fail("values of more than {} bytes", limits_.max_memory_bytes);
    }
  }
  size_t room_bytes() const { return limits_.max_memory_bytes - memory_bytes_; }
  const Limits& limits() const { return limits_; }

 private:
  friend class DepthGuard;
  const Limits limits_;
  const std::string& name_;
  int64_t steps_ = 0, memory_bytes_ = 0;
  int depth_ = 0;
};

/// One level of recursion of the interpreter.
class DepthGuard {
 public:
  explicit DepthGuard(Budget& budget) : budget_(budget) {
    if (++budget.depth_ > kMaxDepth) {
      --budget.depth_;
      budget.Fail("nested deeper than {} levels", kMaxDepth);
    }
  }
  ~DepthGuard() { --budget_.depth_; }
  DepthGuard(const DepthGuard&) = delete;

 private:
  static constexpr int kMaxDepth = 500;
  Budget& budget_;
};

enum class Kind : uint8_t {
  kUndefined,
  kNone,
  kBool,
  kInt,
  kFloat,
  kString,
  kList,
  kTuple,
  kDict,
  kRange,
  kView,
  kGenerator,
  kNamespace,
  kLoop,
  kMacro,
  kFunction,
};

/// What Python calls the type.
const char* KindName(Kind kind);

/// What a value on the heap is. `depth` of a container is one more than that of its deepest
/// element, and bounded: destructors recurse.
struct Object {
  Object(Budget& budget, int64_t bytes) : budget(&budget), bytes(bytes) { budget.Allocate(bytes); }
  virtual ~Object() { budget->Free(bytes); }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  Budget* budget;
  int64_t bytes;
  int depth = 0;
};

class Value {
 public:
  Value() = default;  ///< undefined
  static Value None() { return Value(Kind::kNone, 0); }
  static Value Bool(bool value) { return Value(Kind::kBool, value); }
  static Value Int(int64_t value) { return Value(Kind::kInt, value); }
  static Value Float(double value) {
    Value out(Kind::kFloat, 0);
    out.number_ = value;
    return out;
  }
  Value(Kind kind, std::shared_ptr<Object> object) : kind_(kind), object_(std::move(object)) {}

  Kind kind() const { return kind_; }
  bool is(Kind kind) const { return kind_ == kind; }
  bool is_undefined() const { return kind_ == Kind::kUndefined; }
  bool is_string() const { return kind_ == Kind::kString; }
  /// bool counts as int, as in Python.
  bool is_integer() const { return kind_ == Kind::kInt || kind_ == Kind::kBool; }
  bool is_number() const { return is_integer() || kind_ == Kind::kFloat; }

  int64_t integer() const { return integer_; }
  double number() const { return kind_ == Kind::kFloat ? number_ : static_cast<double>(integer_); }
  const std::string& text() const;          ///< requires a string
  const std::vector<Value>& items() const;  ///< requires a list or tuple
  const Object* object() const { return object_.get(); }
  template <typename T>
  T& As() const {
    return static_cast<T&>(*object_);
  }

 private:
  Value(Kind kind, int64_t integer) : kind_(kind), integer_(integer) {}

  Kind kind_ = Kind::kUndefined;
  union {
    int64_t integer_ = 0;
    double number_;
  };
  std::shared_ptr<Object> object_;  // of an undefined value: the message, a Text
};

struct Text : Object {
  Text(Budget& budget, std::string text);
  std::string text;
  int64_t length;  ///< code points
  bool ascii() const { return length == static_cast<int64_t>(text.size()); }
};

struct Sequence : Object {
  Sequence(Budget& budget, std::vector<Value> items);
  std::vector<Value> items;
};

struct Dict : Object {
  explicit Dict(Budget& budget) : Object(budget, sizeof(Dict) + 64) {}
  std::vector<std::pair<Value, Value>> items;  ///< in order of insertion

  /// Null if absent. A key that Python cannot hash is an Error.
  const Value* Find(const Value& key) const;
  const Value* Find(std::string_view key) const;
  void Set(const Value& key, Value value);

 private:
  std::unordered_multimap<uint64_t, size_t> index_;
};

struct Range : Object {
  Range(Budget& budget, int64_t start, int64_t stop, int64_t step);
  int64_t start, stop, step, length;  ///< all of less than 61 bits
};

struct View : Object {
  enum Part { kKeys, kValues, kItems };
  View(Budget& budget, Value dict, Part part);
  Value dict;
  Part part;
};

/// What a for loop walks over; one use.
class Iterator {
 public:
  virtual ~Iterator() = default;
  virtual bool Next(Value* out) = 0;
};

struct Generator : Object {
  /// `depth` of what the iterator holds.
  Generator(Budget& budget, std::unique_ptr<Iterator> iterator, int depth);
  std::unique_ptr<Iterator> iterator;
};

/// Owned by the interpreter, which frees all at the end: only these can form cycles.
struct Namespace : Object {
  explicit Namespace(Budget& budget) : Object(budget, sizeof(Namespace)), attributes(budget) {}
  Dict attributes;
};

/// Arguments of a call.
struct Args {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keywords;
};

class Interpreter;
/// A filter (of its value), a method (of its object) or a function (self undefined).
using Native = Value (*)(Interpreter& interpreter, const Value& self, const Args& args);

struct Function : Object {
  Function(Budget& budget, std::string name, Native native, Value self);
  std::string name;
  Native native;
  Value self;
};

Value MakeString(Budget& budget, std::string text);
Value MakeList(Budget& budget, std::vector<Value> items);
Value MakeTuple(Budget& budget, std::vector<Value> items);
Value MakeGenerator(Budget& budget, std::unique_ptr<Iterator> iterator, int depth);
/// Undefined, with the message of the Error that its use is.
Value MakeUndefined(Budget& budget, std::string message);
/// Depth-limited; strings must be UTF-8.
Value FromJson(Budget& budget, const Json& json, int depth = 0);

/// Fails with the message of an undefined value.
[[noreturn]] void FailUndefined(Budget& budget, const Value& value);

bool Truthy(const Value& value);
bool Equal(Budget& budget, const Value& a, const Value& b);
/// a < b (or, with `or_equal`, a <= b), an Error where Python has no order.
bool Less(Budget& budget, const Value& a, const Value& b, bool or_equal = false);
/// Python's hash, an Error for what has none.
uint64_t Hash(Budget& budget, const Value& value);
bool IsHashable(const Value& value);
bool Contains(Budget& budget, const Value& container, const Value& element);
/// len(); absent where Python has none.
std::optional<int64_t> Length(const Value& value);
bool IsIterable(const Value& value);
std::unique_ptr<Iterator> Iterate(Budget& budget, const Value& value);
std::vector<Value> ToVector(Budget& budget, const Value& value);

/// str() and repr().
std::string ToString(Budget& budget, const Value& value);
std::string Repr(Budget& budget, const Value& value);

struct JsonStyle {
  bool ensure_ascii = false, sort_keys = false;
  std::optional<std::string> indent;
  std::string item_separator = ", ", key_separator = ": ";
};
/// json.dumps.
std::string ToJson(Budget& budget, const Value& value, const JsonStyle& style);

/// "+", "-", "*", "/", "//", "%", "**".
Value Arithmetic(Budget& budget, std::string_view op, const Value& a, const Value& b);
Value Negate(Budget& budget, const Value& value);
/// object[start:stop:step]; undefined bounds are Errors, None is "absent".
Value Slice(Budget& budget, const Value& object, const Value& start, const Value& stop,
            const Value& step);
/// object[index] of a string, list, tuple or range; nothing if out of range.
std::optional<Value> Element(Budget& budget, const Value& object, int64_t index);

}  // namespace detour::data::jinja
