#include "data/jinja_value.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "data/jinja_text.h"
#include "data/utf8.h"

namespace detour::data::jinja {
namespace {

constexpr int kMaxValueDepth = 100;

int Depth(const Value& value) { return value.object() == nullptr ? 0 : value.object()->depth; }

int Deeper(Budget& budget, int depth) {
  if (depth >= kMaxValueDepth) budget.Fail("a value nested deeper than {} levels", kMaxValueDepth);
  return depth + 1;
}

uint64_t Mix(uint64_t x) {  // splitmix64
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

template <typename T>
Value Make(Kind kind, Budget& budget, T&& argument) {
  using Type = std::conditional_t<std::is_same_v<std::decay_t<T>, std::string>, Text, Sequence>;
  return Value(kind, std::make_shared<Type>(budget, std::forward<T>(argument)));
}

}  // namespace

const char* KindName(Kind kind) {
  static constexpr const char* kNames[] = {
      "Undefined", "None",  "bool",   "int",       "float",     "str",    "list",    "tuple",
      "dict",      "range", "a view", "generator", "Namespace", "a loop", "a macro", "a function"};
  return kNames[static_cast<int>(kind)];
}

const std::string& Value::text() const { return As<Text>().text; }
const std::vector<Value>& Value::items() const { return As<Sequence>().items; }

Text::Text(Budget& budget, std::string content)
    : Object(budget, sizeof(Text) + content.size()), text(std::move(content)) {
  budget.ChargeBytes(text.size());
  length = CountCodePoints(text);
}

Sequence::Sequence(Budget& budget, std::vector<Value> elements)
    : Object(budget, sizeof(Sequence) + elements.size() * sizeof(Value)),
      items(std::move(elements)) {
  budget.Charge(1 + items.size() / 8);
  for (const Value& item : items) depth = std::max(depth, Depth(item));
  depth = Deeper(budget, depth);
}

Range::Range(Budget& budget, int64_t start, int64_t stop, int64_t step)
    : Object(budget, sizeof(Range)), start(start), stop(stop), step(step) {
  constexpr int64_t kMax = int64_t{1} << 60;
  if (step == 0) budget.Fail("the step of a range is zero");
  if (std::max({start, stop, step}) > kMax || std::min({start, stop, step}) < -kMax) {
    budget.Fail("a range of numbers that are too large");
  }
  const int64_t distance = step > 0 ? stop - start : start - stop;
  length = distance > 0 ? (distance - 1) / std::abs(step) + 1 : 0;
}

View::View(Budget& budget, Value dict_value, Part part)
    : Object(budget, sizeof(View)), dict(std::move(dict_value)), part(part) {
  depth = Deeper(budget, Depth(dict));
}

Generator::Generator(Budget& budget, std::unique_ptr<Iterator> it, int inner_depth)
    : Object(budget, sizeof(Generator) + 128), iterator(std::move(it)) {
  depth = Deeper(budget, inner_depth);
}

Function::Function(Budget& budget, std::string function_name, Native native, Value object)
    : Object(budget, sizeof(Function)),
      name(std::move(function_name)),
      native(native),
      self(std::move(object)) {
  depth = Deeper(budget, Depth(self));
}

const Value* Dict::Find(const Value& key) const {
  const auto [begin, end] = index_.equal_range(Hash(*budget, key));
  for (auto it = begin; it != end; ++it) {
    budget->Charge(1);
    const auto& [item_key, value] = items[it->second];
    if (Equal(*budget, item_key, key)) return &value;
  }
  return nullptr;
}

const Value* Dict::Find(std::string_view key) const {
  const auto [begin, end] = index_.equal_range(Mix(std::hash<std::string_view>()(key)));
  for (auto it = begin; it != end; ++it) {
    budget->Charge(1);
    const auto& [item_key, value] = items[it->second];
    if (item_key.is_string() && item_key.text() == key) return &value;
  }
  return nullptr;
}

void Dict::Set(const Value& key, Value value) {
  depth = std::max({depth, Deeper(*budget, Depth(value)), Deeper(*budget, Depth(key))});
  if (const Value* old = Find(key); old != nullptr) {
    *const_cast<Value*>(old) = std::move(value);
    return;
  }
  constexpr int64_t kEntryBytes = 2 * sizeof(Value) + 48;
  budget->Charge(1);
  budget->Allocate(kEntryBytes);
  bytes += kEntryBytes;
  index_.emplace(Hash(*budget, key), items.size());
  items.emplace_back(key, std::move(value));
}

Value MakeString(Budget& budget, std::string text) {
  return Make(Kind::kString, budget, std::move(text));
}
Value MakeList(Budget& budget, std::vector<Value> items) {
  return Make(Kind::kList, budget, std::move(items));
}
Value MakeTuple(Budget& budget, std::vector<Value> items) {
  return Make(Kind::kTuple, budget, std::move(items));
}
Value MakeUndefined(Budget& budget, std::string message) {
  return Make(Kind::kUndefined, budget, std::move(message));
}
Value MakeGenerator(Budget& budget, std::unique_ptr<Iterator> iterator, int depth) {
  return Value(Kind::kGenerator, std::make_shared<Generator>(budget, std::move(iterator), depth));
}

Value FromJson(Budget& budget, const Json& json, int depth) {
  if (depth >= kMaxValueDepth)
    budget.Fail("a variable nested deeper than {} levels", kMaxValueDepth);
  budget.Charge(1);
  const auto string = [&](const std::string& text) {
    if (ValidUtf8Prefix(text) != text.size()) {
      budget.Fail("a variable holds text that is not UTF-8: \"{}\"", Printable(text, 60));
    }
    return MakeString(budget, text);
  };
  switch (json.type()) {
    case Json::value_t::boolean:
      return Value::Bool(json.get<bool>());
    case Json::value_t::number_unsigned:
      if (json.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        budget.Fail("a variable holds an integer of more than 64 bits");
      }
      [[fallthrough]];
    case Json::value_t::number_integer:
      return Value::Int(json.get<int64_t>());
    case Json::value_t::number_float:
      return Value::Float(json.get<double>());
    case Json::value_t::string:
      return string(json.get_ref<const std::string&>());
    case Json::value_t::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const Json& element : json) items.push_back(FromJson(budget, element, depth + 1));
      return MakeList(budget, std::move(items));
    }
    case Json::value_t::object: {
      auto dict = std::make_shared<Dict>(budget);
      for (const auto& [key, value] : json.items()) {
        dict->Set(string(key), FromJson(budget, value, depth + 1));
      }
      return Value(Kind::kDict, std::move(dict));
    }
    default:
      return Value::None();
  }
}

void FailUndefined(Budget& budget, const Value& value) {
  if (value.object() == nullptr) budget.Fail("a value is undefined");
  budget.Fail("{}", value.As<Text>().text);
}

bool Truthy(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kNone:
      return false;
    case Kind::kBool:
    case Kind::kInt:
      return value.integer() != 0;
    case Kind::kFloat:
      return value.number() != 0;
    default:
      return Length(value).value_or(1) != 0;
  }
}

bool Equal(Budget& budget, const Value& a, const Value& b) {
  budget.Charge(1);
  if (a.is_number() && b.is_number()) {
    if (a.is_integer() && b.is_integer()) return a.integer() == b.integer();
    // The 64 bits of a long double hold an int64 and a double.
    const auto wide = [](const Value& v) {
      return v.is_integer() ? static_cast<long double>(v.integer())
                            : static_cast<long double>(v.number());
    };
    return wide(a) == wide(b);
  }
  if (a.kind() != b.kind()) return false;
  if (a.object() == b.object()) return true;
  DepthGuard guard(budget);
  switch (a.kind()) {
    case Kind::kUndefined:
      return true;
    case Kind::kString:
      budget.ChargeBytes(std::min(a.text().size(), b.text().size()));
      return a.text() == b.text();
    case Kind::kList:
    case Kind::kTuple:
      return a.items().size() == b.items().size() &&
             std::equal(a.items().begin(), a.items().end(), b.items().begin(),
                        [&](const Value& x, const Value& y) { return Equal(budget, x, y); });
    case Kind::kDict: {
      const Dict &x = a.As<Dict>(), &y = b.As<Dict>();
      if (x.items.size() != y.items.size()) return false;
      return std::all_of(x.items.begin(), x.items.end(), [&](const auto& item) {
        const Value* other = y.Find(item.first);
        return other != nullptr && Equal(budget, item.second, *other);
      });
    }
    case Kind::kRange: {
      const Range &x = a.As<Range>(), &y = b.As<Range>();
      return x.length == y.length && (x.length == 0 || x.start == y.start) &&
             (x.length < 2 || x.step == y.step);
    }
    case Kind::kView:
      budget.Fail("views of a dict cannot be compared: make lists of them");
    case Kind::kFunction: {
      const Function &x = a.As<Function>(), &y = b.As<Function>();
      return x.native == y.native && x.self.object() == y.self.object();
    }
    default:
      return false;
  }
}

bool Less(Budget& budget, const Value& a, const Value& b, bool or_equal) {
  budget.Charge(1);
  if (a.is_undefined()) FailUndefined(budget, a);
  if (b.is_undefined()) FailUndefined(budget, b);
  if (a.is_number() && b.is_number()) {
    if (a.is_integer() && b.is_integer()) {
      return or_equal ? a.integer() <= b.integer() : a.integer() < b.integer();
    }
    const long double x = a.is_integer() ? static_cast<long double>(a.integer()) : a.number();
    const long double y = b.is_integer() ? static_cast<long double>(b.integer()) : b.number();
    return or_equal ? x <= y : x < y;
  }
  if (a.is_string() && b.is_string()) {  // the order of UTF-8 bytes is that of code points
    budget.ChargeBytes(std::min(a.text().size(), b.text().size()));
    const int order = a.text().compare(b.text());
    return or_equal ? order <= 0 : order < 0;
  }
  if (a.kind() == b.kind() && (a.is(Kind::kList) || a.is(Kind::kTuple))) {
    DepthGuard guard(budget);
    const size_t common = std::min(a.items().size(), b.items().size());
    for (size_t i = 0; i < common; ++i) {
      if (!Equal(budget, a.items()[i], b.items()[i])) {
        return Less(budget, a.items()[i], b.items()[i], or_equal);
      }
    }
    return or_equal ? a.items().size() <= b.items().size() : a.items().size() < b.items().size();
  }
  budget.Fail("no order between {} and {}", KindName(a.kind()), KindName(b.kind()));
}

bool IsHashable(const Value& value) {
  switch (value.kind()) {
    case Kind::kList:
    case Kind::kDict:
      return false;
    case Kind::kView:
      return value.As<View>().part == View::kValues;
    case Kind::kTuple:
      return std::all_of(value.items().begin(), value.items().end(), IsHashable);
    default:
      return true;
  }
}

uint64_t Hash(Budget& budget, const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kNone:
      return Mix(static_cast<uint64_t>(value.kind()) + 1);
    case Kind::kBool:
    case Kind::kInt:
      return Mix(static_cast<uint64_t>(value.integer()));
    case Kind::kFloat: {
      const double number = value.number();
      if (number == std::floor(number) && std::abs(number) < 0x1p62) {
        return Mix(static_cast<uint64_t>(static_cast<int64_t>(number)));
      }
      return Mix(std::hash<double>()(number));
    }
    case Kind::kString:
      budget.ChargeBytes(value.text().size());
      return Mix(std::hash<std::string_view>()(value.text()));
    case Kind::kTuple: {
      DepthGuard guard(budget);
      uint64_t hash = value.items().size();
      for (const Value& item : value.items()) {
        budget.Charge(1);
        hash = Mix(hash + Hash(budget, item));
      }
      return hash;
    }
    case Kind::kRange:
      return Mix(value.As<Range>().length);
    case Kind::kFunction:
      return 0;
    default:
      if (!IsHashable(value)) budget.Fail("{} cannot be a key", KindName(value.kind()));
      return Mix(reinterpret_cast<uintptr_t>(value.object()));
  }
}

bool Contains(Budget& budget, const Value& container, const Value& element) {
  switch (container.kind()) {
    case Kind::kString:
      if (!element.is_string()) {
        budget.Fail("only text can be in text, not {}", KindName(element.kind()));
      }
      budget.ChargeBytes(container.text().size(), 8);
      return container.text().find(element.text()) != std::string::npos;
    case Kind::kDict:
      return container.As<Dict>().Find(element) != nullptr;
    case Kind::kView:
      if (container.As<View>().part == View::kKeys) {
        return container.As<View>().dict.As<Dict>().Find(element) != nullptr;
      }
      [[fallthrough]];
    default: {
      const std::unique_ptr<Iterator> iterator = Iterate(budget, container);
      Value item;
      while (iterator->Next(&item)) {
        if (Equal(budget, item, element)) return true;
      }
      return false;
    }
  }
}

std::optional<int64_t> Length(const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return 0;
    case Kind::kString:
      return value.As<Text>().length;
    case Kind::kList:
    case Kind::kTuple:
      return value.items().size();
    case Kind::kDict:
      return value.As<Dict>().items.size();
    case Kind::kRange:
      return value.As<Range>().length;
    case Kind::kView:
      return value.As<View>().dict.As<Dict>().items.size();
    default:
      return std::nullopt;
  }
}

}  // namespace detour::data::jinja
