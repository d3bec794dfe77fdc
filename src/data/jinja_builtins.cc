// Arguments of calls, the tests, and the functions that every template has.
#include <algorithm>
#include <array>
#include <ctime>
#include <unordered_map>

#include "core/json.h"
#include "data/jinja_interpreter.h"
#include "data/jinja_text.h"

namespace detour::data::jinja {

std::vector<const Value*> Bind(Budget& budget, std::string_view what, const Args& args,
                               std::initializer_list<std::string_view> names, int num_required) {
  std::vector<const Value*> out(names.size(), nullptr);
  if (args.positional.size() > names.size()) {
    budget.Fail("{}: {} arguments, at most {} expected", what, args.positional.size(),
                names.size());
  }
  for (size_t i = 0; i < args.positional.size(); ++i) out[i] = &args.positional[i];
  for (const auto& [key, value] : args.keywords) {
    const auto it = std::find(names.begin(), names.end(), key);
    if (it == names.end() || key[0] == '/') {
      budget.Fail("{}: no argument \"{}\"", what, Printable(key, 60));
    }
    const Value*& place = out[it - names.begin()];
    if (place != nullptr) budget.Fail("{}: the argument \"{}\" occurs twice", what, key);
    place = &value;
  }
  for (int i = 0; i < num_required; ++i) {
    if (out[i] == nullptr) budget.Fail("{}: argument number {} is missing", what, i + 1);
  }
  return out;
}

int64_t IntegerArg(Budget& budget, const Value* value, int64_t fallback) {
  if (value == nullptr) return fallback;
  if (value->is_undefined()) FailUndefined(budget, *value);
  if (!value->is_integer()) budget.Fail("an integer expected, got {}", KindName(value->kind()));
  return value->integer();
}

bool BoolArg(const Value* value, bool fallback) {
  return value == nullptr ? fallback : Truthy(*value);
}

namespace {

// dict(mapping or pairs, key=value, …).
void FillDict(Interpreter& in, const Args& args, Dict* out) {
  Budget& budget = in.budget();
  if (args.positional.size() > 1) budget.Fail("dict: at most one argument without a name");
  for (const Value& value : args.positional) {
    if (value.is_undefined()) FailUndefined(budget, value);
    if (value.is(Kind::kDict)) {
      for (const auto& [key, item] : value.As<Dict>().items) out->Set(key, item);
      continue;
    }
    const std::unique_ptr<Iterator> iterator = Iterate(budget, value);
    Value pair;
    while (iterator->Next(&pair)) {
      const std::vector<Value> parts = ToVector(budget, pair);
      if (parts.size() != 2) budget.Fail("dict: expected pairs, got {} values", parts.size());
      out->Set(parts[0], parts[1]);
    }
  }
  for (const auto& [key, value] : args.keywords) out->Set(MakeString(budget, key), value);
}

Value MakeDict(Interpreter& in, const Value&, const Args& args) {
  auto dict = std::make_shared<Dict>(in.budget());
  FillDict(in, args, dict.get());
  return Value(Kind::kDict, std::move(dict));
}

Value MakeNamespace(Interpreter& in, const Value&, const Args& args) {
  auto object = std::make_unique<Namespace>(in.budget());
  FillDict(in, args, &object->attributes);
  for (const auto& [key, value] : object->attributes.items) {
    if (key.is_string() && key.text().substr(0, 1) == "_") {
      in.budget().Fail("a namespace cannot store the name \"{}\"", Printable(key.text(), 60));
    }
  }
  return in.Own(Kind::kNamespace, std::move(object));
}

Value MakeRange(Interpreter& in, const Value&, const Args& args) {
  constexpr int64_t kMaxLength = 100'000;  // jinja2's
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "range", args, {"/start", "/stop", "/step"}, 1);
  int64_t start = 0, stop = IntegerArg(budget, bound[0], 0);
  if (bound[1] != nullptr) {
    start = stop;
    stop = IntegerArg(budget, bound[1], 0);
  }
  auto range = std::make_shared<Range>(budget, start, stop, IntegerArg(budget, bound[2], 1));
  if (range->length > kMaxLength) budget.Fail("a range of more than {} numbers", kMaxLength);
  return Value(Kind::kRange, std::move(range));
}

Value RaiseException(Interpreter& in, const Value&, const Args& args) {
  const auto bound = Bind(in.budget(), "raise_exception", args, {"message"}, 1);
  in.budget().Fail("the template refuses: {}", Printable(ToString(in.budget(), *bound[0]), 500));
}

Value StrftimeNow(Interpreter& in, const Value&, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "strftime_now", args, {"format"}, 1);
  constexpr size_t kMaxFormat = 1000, kMaxResult = 10'000;
  if (!bound[0]->is_string() || bound[0]->text().size() > kMaxFormat ||
      bound[0]->text().find('\0') != std::string::npos) {
    budget.Fail("strftime_now: a format of at most {} bytes expected", kMaxFormat);
  }
  std::tm time = {};
  if (in.options().clock) {
    time = in.options().clock();
  } else {
    const std::time_t now = std::time(nullptr);
    localtime_r(&now, &time);
  }
  // What Python does itself: microseconds, and no zone for a time without one.
  std::string format;
  const std::string& text = bound[0]->text();
  for (size_t i = 0; i < text.size(); ++i) {
    const char next = text[i] == '%' && i + 1 < text.size() ? text[i + 1] : '\0';
    if (next == 'f') {
      format += "000000";
    } else if (next != 'z' && next != 'Z') {
      format += text[i];
      if (next != '\0') format += next;
    }
    i += next != '\0';
  }
  std::string out(kMaxResult, '\0');
  // The space tells an empty result from one that is too long.
  const size_t length = std::strftime(out.data(), out.size(), (format + " ").c_str(), &time);
  if (length == 0) budget.Fail("strftime_now: a result of more than {} bytes", kMaxResult);
  out.resize(length - 1);
  return MakeString(budget, std::move(out));
}

// --- tests ------------------------------------------------------------------------------------

const Value& OneArg(Interpreter& in, const char* what, const Args& args) {
  return *Bind(in.budget(), what, args, {"other"}, 1)[0];
}

template <Kind kKind>
bool IsKind(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "test", args, {});
  return value.is(kKind);
}

template <bool kExpected>
bool IsBool(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "test", args, {});
  return value.is(Kind::kBool) && (value.integer() != 0) == kExpected;
}

bool Divides(Interpreter& in, const Value& value, const Value& divisor, int64_t rest) {
  return Equal(in.budget(), Arithmetic(in.budget(), "%", value, divisor), Value::Int(rest));
}

bool SameAs(Interpreter& in, const Value& value, const Args& args) {
  const Value& other = OneArg(in, "sameas", args);
  if (value.kind() != other.kind()) return false;
  if (value.is(Kind::kInt) || value.is(Kind::kFloat) || value.is_string()) {
    in.budget().Fail("\"sameas\" of numbers and text is not supported. Hint: ==");
  }
  return value.object() == other.object() && value.integer() == other.integer();
}

template <Property kProperty>
bool HasCase(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "test", args, {});
  const std::string text = ToString(in.budget(), value);
  in.budget().ChargeBytes(text.size(), 8);
  return Has(kProperty, text).value_or(false);
}

using TestTable = std::unordered_map<std::string_view, Test>;

void AddComparisons(TestTable* tests) {
  const auto equal = [](Interpreter& in, const Value& v, const Args& args) {
    return Equal(in.budget(), v, OneArg(in, "eq", args));
  };
  const auto unequal = [](Interpreter& in, const Value& v, const Args& args) {
    return !Equal(in.budget(), v, OneArg(in, "ne", args));
  };
  const auto less = [](Interpreter& in, const Value& v, const Args& args) {
    return Less(in.budget(), v, OneArg(in, "lt", args));
  };
  const auto less_equal = [](Interpreter& in, const Value& v, const Args& args) {
    return Less(in.budget(), v, OneArg(in, "le", args), true);
  };
  const auto greater = [](Interpreter& in, const Value& v, const Args& args) {
    return Less(in.budget(), OneArg(in, "gt", args), v);
  };
  const auto greater_equal = [](Interpreter& in, const Value& v, const Args& args) {
    return Less(in.budget(), OneArg(in, "ge", args), v, true);
  };
  for (const char* name : {"==", "eq", "equalto"}) (*tests)[name] = equal;
  for (const char* name : {"!=", "ne"}) (*tests)[name] = unequal;
  for (const char* name : {"<", "lt", "lessthan"}) (*tests)[name] = less;
  for (const char* name : {"<=", "le"}) (*tests)[name] = less_equal;
  for (const char* name : {">", "gt", "greaterthan"}) (*tests)[name] = greater;
  for (const char* name : {">=", "ge"}) (*tests)[name] = greater_equal;
}

TestTable MakeTests() {
  TestTable tests = {
      {"undefined", IsKind<Kind::kUndefined>},
      {"none", IsKind<Kind::kNone>},
      {"boolean", IsKind<Kind::kBool>},
      {"integer", IsKind<Kind::kInt>},
      {"float", IsKind<Kind::kFloat>},
      {"string", IsKind<Kind::kString>},
      {"mapping", IsKind<Kind::kDict>},
      {"true", IsBool<true>},
      {"false", IsBool<false>},
      {"sameas", SameAs},
      {"lower", HasCase<Property::kLower>},
      {"upper", HasCase<Property::kUpper>},
  };
  tests["defined"] = [](Interpreter& in, const Value& value, const Args& args) {
    Bind(in.budget(), "defined", args, {});
    return !value.is_undefined();
  };
  tests["number"] = [](Interpreter& in, const Value& value, const Args& args) {
    Bind(in.budget(), "number", args, {});
    return value.is_number();
  };
  tests["sequence"] = [](Interpreter& in, const Value& value, const Args& args) {
    Bind(in.budget(), "sequence", args, {});
    return Length(value).has_value() && !value.is(Kind::kView);
  };
  tests["iterable"] = [](Interpreter& in, const Value& value, const Args& args) {
    Bind(in.budget(), "iterable", args, {});
    return IsIterable(value);
  };
  tests["callable"] = [](Interpreter& in, const Value& value, const Args& args) {
    Bind(in.budget(), "callable", args, {});
    return value.is(Kind::kFunction) || value.is(Kind::kMacro) || value.is(Kind::kLoop) ||
           value.is_undefined();
  };
  tests["escaped"] = [](Interpreter& in, const Value&, const Args& args) {
    Bind(in.budget(), "escaped", args, {});
    return false;
  };
  tests["odd"] = [](Interpreter& in, const Value& value, const Args& args) {
    Bind(in.budget(), "odd", args, {});
    return Divides(in, value, Value::Int(2), 1);
  };
  tests["even"] = [](Interpreter& in, const Value& value, const Args& args) {
    Bind(in.budget(), "even", args, {});
    return Divides(in, value, Value::Int(2), 0);
  };
  tests["divisibleby"] = [](Interpreter& in, const Value& value, const Args& args) {
    return Divides(in, value, *Bind(in.budget(), "divisibleby", args, {"num"}, 1)[0], 0);
  };
  tests["in"] = [](Interpreter& in, const Value& value, const Args& args) {
    return Contains(in.budget(), *Bind(in.budget(), "in", args, {"seq"}, 1)[0], value);
  };
  tests["filter"] = [](Interpreter& in, const Value& value, const Args& args) {
    Bind(in.budget(), "filter", args, {});
    return value.is_string() && FindFilter(value.text()) != nullptr;
  };
  tests["test"] = [](Interpreter& in, const Value& value, const Args& args) {
    Bind(in.budget(), "test", args, {});
    return value.is_string() && FindTest(value.text()) != nullptr;
  };
  AddComparisons(&tests);
  return tests;
}

}  // namespace

Test FindTest(std::string_view name) {
  static const TestTable tests = MakeTests();
  const auto it = tests.find(name);
  return it == tests.end() ? nullptr : it->second;
}

Native FindGlobal(std::string_view name) {
  if (name == "range") return MakeRange;
  if (name == "dict") return MakeDict;
  if (name == "namespace") return MakeNamespace;
  if (name == "raise_exception") return RaiseException;
  if (name == "strftime_now") return StrftimeNow;
  return nullptr;
}

}  // namespace detour::data::jinja
