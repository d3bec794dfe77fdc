// Arithmetic, elements, slices and iteration of values.
#include <algorithm>
#include <cmath>

#include "data/jinja_text.h"
#include "data/jinja_value.h"
#include "data/utf8.h"

namespace detour::data::jinja {
namespace {

[[noreturn]] void FailOverflow(Budget& budget) { budget.Fail("an integer of more than 64 bits"); }

int64_t FloorDivide(Budget& budget, int64_t a, int64_t b) {
  if (b == 0) budget.Fail("division by zero");
  if (b == -1) {
    int64_t out = 0;
    if (__builtin_sub_overflow(int64_t{0}, a, &out)) FailOverflow(budget);
    return out;
  }
  return a / b - ((a % b != 0) && ((a < 0) != (b < 0)));
}

double FloatMod(double a, double b) {
  double mod = std::fmod(a, b);
  if (mod != 0) {
    if ((b < 0) != (mod < 0)) mod += b;
  } else {
    mod = std::copysign(0.0, b);
  }
  return mod;
}

double FloatFloorDivide(double a, double b) {
  const double mod = std::fmod(a, b);
  double div = (a - mod) / b;
  if (mod != 0 && (b < 0) != (mod < 0)) div -= 1;
  if (div == 0) return std::copysign(0.0, a / b);
  const double floor = std::floor(div);
  return div - floor > 0.5 ? floor + 1 : floor;
}

Value IntPower(Budget& budget, int64_t base, int64_t exponent) {
  int64_t out = 1;
  bool overflow = false;
  while (exponent > 0) {
    // An overflow of the square matters only if it is used.
    if (exponent & 1) {
      if (overflow || __builtin_mul_overflow(out, base, &out)) FailOverflow(budget);
    }
    exponent >>= 1;
    if (exponent > 0) overflow |= __builtin_mul_overflow(base, base, &base);
  }
  return Value::Int(out);
}

Value Power(Budget& budget, const Value& a, const Value& b) {
  if (a.is_integer() && b.is_integer() && b.integer() >= 0) {
    if (a.integer() == 0 || a.integer() == 1) {
      return Value::Int(b.integer() == 0 ? 1 : a.integer());
    }
    if (a.integer() == -1) return Value::Int(b.integer() % 2 == 0 ? 1 : -1);
    return IntPower(budget, a.integer(), b.integer());
  }
  const double x = a.number(), y = b.number();
  if (x == 0 && y < 0) budget.Fail("zero to a negative power");
  if (x < 0 && std::isfinite(x) && std::isfinite(y) && y != std::floor(y)) {
    budget.Fail("complex numbers are not supported");
  }
  const double out = std::pow(x, y);
  if (std::isinf(out) && std::isfinite(x) && std::isfinite(y)) budget.Fail("a number too large");
  return Value::Float(out);
}

Value IntArithmetic(Budget& budget, std::string_view op, int64_t a, int64_t b) {
  int64_t out = 0;
  bool overflow = false;
  if (op == "+") {
    overflow = __builtin_add_overflow(a, b, &out);
  } else if (op == "-") {
    overflow = __builtin_sub_overflow(a, b, &out);
  } else if (op == "*") {
    overflow = __builtin_mul_overflow(a, b, &out);
  } else if (op == "//") {
    out = FloorDivide(budget, a, b);
  } else if (op == "%") {
    if (b == 0) budget.Fail("division by zero");
    out = b == -1 ? 0 : a % b;
    if (out != 0 && (out < 0) != (b < 0)) out += b;
  } else {
    if (b == 0) budget.Fail("division by zero");
    constexpr int64_t kExact = int64_t{1} << 53;
    if (a <= kExact && a >= -kExact && b <= kExact && b >= -kExact) {
      return Value::Float(static_cast<double>(a) / static_cast<double>(b));
    }
    return Value::Float(static_cast<double>(static_cast<long double>(a) / b));
  }
  if (overflow) FailOverflow(budget);
  return Value::Int(out);
}

Value FloatArithmetic(Budget& budget, std::string_view op, double a, double b) {
  if (op == "+") return Value::Float(a + b);
  if (op == "-") return Value::Float(a - b);
  if (op == "*") return Value::Float(a * b);
  if (b == 0) budget.Fail("division by zero");
  if (op == "/") return Value::Float(a / b);
  return Value::Float(op == "%" ? FloatMod(a, b) : FloatFloorDivide(a, b));
}

// A string, list or tuple `count` times.
Value Repeat(Budget& budget, const Value& value, int64_t count) {
  count = std::max<int64_t>(count, 0);
  const auto check = [&](size_t size, size_t unit_bytes) {
    if (size > 0 && count > static_cast<int64_t>(budget.room_bytes() / unit_bytes / size)) {
      budget.Fail("values of more than {} bytes", budget.limits().max_memory_bytes);
    }
    budget.ChargeBytes(size * unit_bytes * count);
  };
  if (value.is_string()) {
    check(value.text().size(), 1);
    std::string out;
    out.reserve(value.text().size() * count);
    if (!value.text().empty()) {
      for (int64_t i = 0; i < count; ++i) out += value.text();
    }
    return MakeString(budget, std::move(out));
  }
  check(value.items().size(), sizeof(Value));
  std::vector<Value> out;
  out.reserve(value.items().size() * count);
  if (!value.items().empty()) {
    for (int64_t i = 0; i < count; ++i) {
      out.insert(out.end(), value.items().begin(), value.items().end());
    }
  }
  return value.is(Kind::kList) ? MakeList(budget, std::move(out))
                               : MakeTuple(budget, std::move(out));
}

bool IsConcrete(const Value& value) {
  return value.is_string() || value.is(Kind::kList) || value.is(Kind::kTuple);
}

Value Join(Budget& budget, const Value& a, const Value& b) {
  if (a.is_string()) {
    budget.CheckRoom(a.text().size() + b.text().size());
    return MakeString(budget, a.text() + b.text());
  }
  std::vector<Value> out;
  budget.CheckRoom((a.items().size() + b.items().size()) * sizeof(Value));
  budget.Charge((a.items().size() + b.items().size()) / 8);
  out.reserve(a.items().size() + b.items().size());
  out.insert(out.end(), a.items().begin(), a.items().end());
  out.insert(out.end(), b.items().begin(), b.items().end());
  return a.is(Kind::kList) ? MakeList(budget, std::move(out)) : MakeTuple(budget, std::move(out));
}

}  // namespace

Value Arithmetic(Budget& budget, std::string_view op, const Value& a, const Value& b) {
  if (op == "%" && a.is_string()) {
    budget.Fail("formatting text with % is not supported. Hint: join parts with ~");
  }
  if (a.is_undefined()) FailUndefined(budget, a);
  if (b.is_undefined()) FailUndefined(budget, b);
  if (a.is_number() && b.is_number()) {
    if (op == "**") return Power(budget, a, b);
    if (a.is_integer() && b.is_integer()) {
      return IntArithmetic(budget, op, a.integer(), b.integer());
    }
    return FloatArithmetic(budget, op, a.number(), b.number());
  }
  if (op == "+" && a.kind() == b.kind() && IsConcrete(a)) return Join(budget, a, b);
  if (op == "*" && IsConcrete(a) && b.is_integer()) return Repeat(budget, a, b.integer());
  if (op == "*" && IsConcrete(b) && a.is_integer()) return Repeat(budget, b, a.integer());
  if (op == "-" && a.is(Kind::kView) && b.is(Kind::kView)) {
    budget.Fail("set operations are not supported");
  }
  budget.Fail("no \"{}\" of {} and {}", op, KindName(a.kind()), KindName(b.kind()));
}

Value Negate(Budget& budget, const Value& value) {
  if (value.is_undefined()) FailUndefined(budget, value);
  if (!value.is_number()) budget.Fail("no negative of {}", KindName(value.kind()));
  if (value.is(Kind::kFloat)) return Value::Float(-value.number());
  return IntArithmetic(budget, "-", 0, value.integer());
}

std::optional<Value> Element(Budget& budget, const Value& object, int64_t index) {
  const int64_t length = Length(object).value_or(0);
  if (index < 0) index += length;
  if (index < 0 || index >= length) return std::nullopt;
  if (object.is(Kind::kRange)) {
    const Range& range = object.As<Range>();
    return Value::Int(range.start + index * range.step);
  }
  if (!object.is_string()) return object.items()[index];
  const Text& text = object.As<Text>();
  if (text.ascii()) return MakeString(budget, text.text.substr(index, 1));
  budget.ChargeBytes(text.text.size());
  const size_t begin = ByteOffset(text.text, index);
  const int bytes = ReadUtf8Head(std::string_view(text.text).substr(begin)).length;
  return MakeString(budget, text.text.substr(begin, bytes));
}

namespace {

struct Span {
  int64_t start, stop, step, length;
};

// slice(start, stop, step).indices(length).
Span Indices(Budget& budget, int64_t length, const Value& start, const Value& stop,
             const Value& step_value) {
  const auto read = [&](const Value& value) -> std::optional<int64_t> {
    if (value.is(Kind::kNone)) return std::nullopt;
    if (value.is_undefined()) FailUndefined(budget, value);
    if (!value.is_integer()) budget.Fail("a slice needs integers, not {}", KindName(value.kind()));
    return value.integer();
  };
  const int64_t step = std::max(read(step_value).value_or(1), -std::numeric_limits<int64_t>::max());
  if (step == 0) budget.Fail("the step of a slice is zero");
  const int64_t low = step < 0 ? -1 : 0, high = step < 0 ? length - 1 : length;
  const auto clip = [&](const Value& value, int64_t fallback) {
    std::optional<int64_t> at = read(value);
    if (!at) return fallback;
    if (*at < 0) *at += length;
    return std::clamp(*at, low, std::max(low, high));
  };
  const int64_t begin = clip(start, step < 0 ? high : low);
  const int64_t end = clip(stop, step < 0 ? low : high);
  int64_t count = 0;
  if (step > 0 && begin < end) count = (end - begin - 1) / step + 1;
  if (step < 0 && begin > end) count = (begin - end - 1) / -step + 1;
  return {begin, end, step, count};
}

Value SliceText(Budget& budget, const Text& text, const Span& span) {
  if (span.step == 1 || span.length < 2) {
    if (span.length == 0) return MakeString(budget, "");
    if (text.ascii()) return MakeString(budget, text.text.substr(span.start, span.length));
    budget.ChargeBytes(text.text.size());
    const std::string_view rest =
        std::string_view(text.text).substr(ByteOffset(text.text, span.start));
    return MakeString(budget, std::string(rest.substr(0, ByteOffset(rest, span.length))));
  }
  // Every character's first byte.
  budget.Charge(text.length / 8);
  std::vector<size_t> begins;
  if (!text.ascii()) {
    budget.CheckRoom(text.length * sizeof(size_t));
    for (size_t i = 0; i < text.text.size(); ++i) {
      if ((static_cast<uint8_t>(text.text[i]) & 0xC0) != 0x80) begins.push_back(i);
    }
    begins.push_back(text.text.size());
  }
  std::string out;
  for (int64_t i = 0; i < span.length; ++i) {
    const int64_t at = span.start + i * span.step;
    if (begins.empty()) {
      out += text.text[at];
    } else {
      out.append(text.text, begins[at], begins[at + 1] - begins[at]);
    }
  }
  return MakeString(budget, std::move(out));
}

}  // namespace

Value Slice(Budget& budget, const Value& object, const Value& start, const Value& stop,
            const Value& step) {
  if (object.is_undefined()) FailUndefined(budget, object);
  if (!IsConcrete(object) && !object.is(Kind::kRange)) {
    budget.Fail("no slice of {}", KindName(object.kind()));
  }
  const Span span = Indices(budget, *Length(object), start, stop, step);
  if (object.is_string()) return SliceText(budget, object.As<Text>(), span);
  if (object.is(Kind::kRange)) {
    const Range& range = object.As<Range>();
    int64_t new_step = 0;
    if (__builtin_mul_overflow(range.step, span.step, &new_step)) FailOverflow(budget);
    return Value(Kind::kRange,
                 std::make_shared<Range>(budget, range.start + span.start * range.step,
                                         range.start + span.stop * range.step, new_step));
  }
  budget.CheckRoom(span.length * sizeof(Value));
  budget.Charge(span.length / 8);
  std::vector<Value> out;
  out.reserve(span.length);
  for (int64_t i = 0; i < span.length; ++i) {
    out.push_back(object.items()[span.start + i * span.step]);
  }
  return object.is(Kind::kList) ? MakeList(budget, std::move(out))
                                : MakeTuple(budget, std::move(out));
}

namespace {

// Over what has elements by index.
class ElementIterator : public Iterator {
 public:
  ElementIterator(Budget& budget, Value object) : budget_(budget), object_(std::move(object)) {}
  bool Next(Value* out) override {
    budget_.Charge(1);
    if (object_.is_string()) {
      const std::string& text = object_.text();
      if (at_ >= static_cast<int64_t>(text.size())) return false;
      const int bytes = ReadUtf8Head(std::string_view(text).substr(at_)).length;
      *out = MakeString(budget_, text.substr(at_, bytes));
      at_ += bytes;
      return true;
    }
    if (at_ >= Length(object_).value_or(0)) return false;
    if (object_.is(Kind::kRange)) {
      const Range& range = object_.As<Range>();
      *out = Value::Int(range.start + at_ * range.step);
    } else {
      *out = object_.items()[at_];
    }
    ++at_;
    return true;
  }

 private:
  Budget& budget_;
  Value object_;
  int64_t at_ = 0;
};

class DictIterator : public Iterator {
 public:
  DictIterator(Budget& budget, Value dict, View::Part part)
      : budget_(budget), dict_(std::move(dict)), part_(part) {}
  bool Next(Value* out) override {
    budget_.Charge(1);
    const Dict& dict = dict_.As<Dict>();
    if (at_ >= dict.items.size()) return false;
    const auto& [key, value] = dict.items[at_++];
    *out = part_ == View::kKeys     ? key
           : part_ == View::kValues ? value
                                    : MakeTuple(budget_, {key, value});
    return true;
  }

 private:
  Budget& budget_;
  Value dict_;
  View::Part part_;
  size_t at_ = 0;
};

// Shares the one position of a generator.
class GeneratorIterator : public Iterator {
 public:
  GeneratorIterator(Budget& budget, Value generator)
      : budget_(budget), generator_(std::move(generator)) {}
  bool Next(Value* out) override {
    DepthGuard guard(budget_);
    budget_.Charge(1);
    return generator_.As<Generator>().iterator->Next(out);
  }

 private:
  Budget& budget_;
  Value generator_;
};

}  // namespace

bool IsIterable(const Value& value) {
  return Length(value).has_value() || value.is(Kind::kGenerator) || value.is(Kind::kLoop);
}

std::unique_ptr<Iterator> Iterate(Budget& budget, const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
    case Kind::kString:
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
      return std::make_unique<ElementIterator>(budget, value);
    case Kind::kDict:
      return std::make_unique<DictIterator>(budget, value, View::kKeys);
    case Kind::kView:
      return std::make_unique<DictIterator>(budget, value.As<View>().dict, value.As<View>().part);
    case Kind::kGenerator:
      return std::make_unique<GeneratorIterator>(budget, value);
    default:
      budget.Fail("{} cannot be walked over", KindName(value.kind()));
  }
}

std::vector<Value> ToVector(Budget& budget, const Value& value) {
  std::vector<Value> out;
  const std::unique_ptr<Iterator> iterator = Iterate(budget, value);
  Value item;
  while (iterator->Next(&item)) out.push_back(std::move(item));
  return out;
}

}  // namespace detour::data::jinja
