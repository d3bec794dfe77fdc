// Methods of strings, dicts, lists and tuples, and of the variable `loop`.
#include <algorithm>
#include <unordered_map>

#include "data/jinja_interpreter.h"
#include "data/jinja_text.h"

namespace detour::data::jinja {
namespace {

using MethodTable = std::unordered_map<std::string_view, Native>;

// The text of a string argument; absent for None and for one that is not given.
std::optional<std::string_view> TextArg(Interpreter& in, const Value* value) {
  if (value == nullptr || value->is(Kind::kNone)) return std::nullopt;
  if (value->is_undefined()) FailUndefined(in.budget(), *value);
  if (!value->is_string()) in.budget().Fail("text expected, got {}", KindName(value->kind()));
  in.budget().ChargeBytes(value->text().size());
  return value->text();
}

const std::string& NeedText(Interpreter& in, const Value* value) {
  if (!TextArg(in, value)) in.budget().Fail("text expected, got None");
  return value->text();
}

// The method's text, with the steps for working on it.
const std::string& Self(Interpreter& in, const Value& self) {
  in.budget().ChargeBytes(self.text().size(), self.As<Text>().ascii() ? 1 : 8);
  return self.text();
}

Value MakeTexts(Interpreter& in, const std::vector<std::string_view>& parts) {
  std::vector<Value> out;
  out.reserve(parts.size());
  for (const std::string_view part : parts) {
    out.push_back(MakeString(in.budget(), std::string(part)));
  }
  return MakeList(in.budget(), std::move(out));
}

template <std::string (*kConvert)(std::string_view)>
Value Convert(Interpreter& in, const Value& self, const Args& args) {
  Bind(in.budget(), "method", args, {});
  return MakeString(in.budget(), kConvert(Self(in, self)));
}

template <Property kProperty>
Value Is(Interpreter& in, const Value& self, const Args& args) {
  Bind(in.budget(), "method", args, {});
  const std::optional<bool> result = Has(kProperty, Self(in, self));
  if (!result) in.budget().Fail("this method is not supported for text that is not ASCII");
  return Value::Bool(*result);
}

template <bool kBegin, bool kEnd>
Value StripMethod(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "strip", args, {"/chars"});
  const auto chars = TextArg(in, bound[0]);
  return MakeString(in.budget(), std::string(Strip(Self(in, self), chars, kBegin, kEnd)));
}

template <bool kFromRight>
Value SplitMethod(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "split", args, {"sep", "maxsplit"});
  const auto separator = TextArg(in, bound[0]);
  if (separator && separator->empty()) in.budget().Fail("split: the separator is empty");
  const int64_t max_splits = IntegerArg(in.budget(), bound[1], -1);
  in.budget().CheckRoom(self.text().size());  // for the parts' places
  in.budget().ChargeBytes(self.text().size(), 8);
  return MakeTexts(in, Split(Self(in, self), separator, max_splits, kFromRight));
}

Value SplitLinesMethod(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "splitlines", args, {"keepends"});
  return MakeTexts(in, SplitLines(Self(in, self), BoolArg(bound[0], false)));
}

// The part of the text between the arguments start and end of find, count and so on, and whether
// start is within the text.
struct Part {
  size_t begin;
  std::string_view text;
  bool valid;
};

Part SubText(Interpreter& in, const Value& self, const Value* start, const Value* end) {
  Budget& budget = in.budget();
  const Text& text = self.As<Text>();
  const auto clip = [&](const Value* value, int64_t fallback) {
    if (value == nullptr || value->is(Kind::kNone)) return fallback;
    const int64_t at = IntegerArg(budget, value, 0);
    return std::max<int64_t>(at < 0 ? at + text.length : at, 0);
  };
  const int64_t first = clip(start, 0);
  const int64_t last = std::min(clip(end, text.length), text.length);
  if (first > last) return {0, {}, false};
  budget.ChargeBytes(text.text.size(), 8);  // searching, too
  const size_t begin = ByteOffset(text.text, first), stop = ByteOffset(text.text, last);
  return {begin, std::string_view(text.text).substr(begin, stop - begin), true};
}

template <bool kFromStart>
Value HasEnd(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "startswith", args, {"/prefix", "/start", "/end"}, 1);
  const Part part = SubText(in, self, bound[1], bound[2]);
  const auto matches = [&](const Value& value) {
    const std::string& piece = NeedText(in, &value);
    if (!part.valid || piece.size() > part.text.size()) return false;
    return part.text.substr(kFromStart ? 0 : part.text.size() - piece.size(), piece.size()) ==
           piece;
  };
  if (!bound[0]->is(Kind::kTuple)) return Value::Bool(matches(*bound[0]));
  for (const Value& value : bound[0]->items()) {
    if (matches(value)) return Value::Bool(true);
  }
  return Value::Bool(false);
}

template <bool kFromRight, bool kMustBeThere>
Value Find(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "find", args, {"/sub", "/start", "/end"}, 1);
  const std::string& piece = NeedText(in, bound[0]);
  const Part part = SubText(in, self, bound[1], bound[2]);
  size_t at = std::string_view::npos;
  if (part.valid) at = kFromRight ? part.text.rfind(piece) : part.text.find(piece);
  if (at == std::string_view::npos) {
    if (kMustBeThere) in.budget().Fail("index: the text is not there");
    return Value::Int(-1);
  }
  const std::string_view before = std::string_view(self.text()).substr(0, part.begin + at);
  return Value::Int(CountCodePoints(before));
}

Value Count(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "count", args, {"/sub", "/start", "/end"}, 1);
  const std::string& piece = NeedText(in, bound[0]);
  const Part part = SubText(in, self, bound[1], bound[2]);
  if (!part.valid) return Value::Int(0);
  if (piece.empty()) return Value::Int(CountCodePoints(part.text) + 1);
  int64_t count = 0;
  for (size_t at = part.text.find(piece); at != std::string_view::npos; ++count) {
    at = part.text.find(piece, at + piece.size());
  }
  return Value::Int(count);
}

Value ReplaceMethod(Interpreter& in, const Value& self, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "replace", args, {"/old", "/new", "/count"}, 2);
  budget.ChargeBytes(self.text().size(), 8);
  std::optional<std::string> out =
      Replace(Self(in, self), NeedText(in, bound[0]), NeedText(in, bound[1]),
              IntegerArg(budget, bound[2], -1), budget.room_bytes());
  if (!out) budget.Fail("values of more than {} bytes", budget.limits().max_memory_bytes);
  return MakeString(budget, std::move(*out));
}

Value JoinMethod(Interpreter& in, const Value& self, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "join", args, {"/iterable"}, 1);
  const std::unique_ptr<Iterator> iterator = Iterate(budget, *bound[0]);
  std::string out;
  bool first = true;
  for (Value item; iterator->Next(&item); first = false) {
    const std::string& part = NeedText(in, &item);
    budget.CheckRoom(out.size() + part.size() + self.text().size());
    budget.ChargeBytes(self.text().size());
    if (!first) out += self.text();
    out += part;
  }
  return MakeString(budget, std::move(out));
}

template <bool kPrefix>
Value RemoveEnd(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "removeprefix", args, {"/text"}, 1);
  const std::string& piece = NeedText(in, bound[0]);
  std::string_view text = Self(in, self);
  if (kPrefix && text.substr(0, piece.size()) == piece) {
    text.remove_prefix(piece.size());
  } else if (!kPrefix && piece.size() <= text.size() &&
             text.substr(text.size() - piece.size()) == piece) {
    text.remove_suffix(piece.size());
  }
  return MakeString(in.budget(), std::string(text));
}

template <bool kFromRight>
Value Partition(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "partition", args, {"/sep"}, 1);
  const std::string& piece = NeedText(in, bound[0]);
  if (piece.empty()) in.budget().Fail("partition: the separator is empty");
  const std::string& text = Self(in, self);
  in.budget().ChargeBytes(text.size(), 8);
  const size_t at = kFromRight ? text.rfind(piece) : text.find(piece);
  const auto make = [&](size_t begin, size_t end) {
    return MakeString(in.budget(), text.substr(begin, end - begin));
  };
  if (at == std::string::npos) {
    const Value empty = MakeString(in.budget(), "");
    return kFromRight ? MakeTuple(in.budget(), {empty, empty, self})
                      : MakeTuple(in.budget(), {self, empty, empty});
  }
  return MakeTuple(in.budget(), {make(0, at), make(at, at + piece.size()),
                                 make(at + piece.size(), text.size())});
}

enum class Align { kLeft, kRight, kCenter };

template <Align kAlign>
Value Pad(Interpreter& in, const Value& self, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "ljust", args, {"/width", "/fill"}, 1);
  const int64_t width = IntegerArg(budget, bound[0], 0);
  const std::string fill = bound[1] == nullptr ? " " : NeedText(in, bound[1]);
  if (CountCodePoints(fill) != 1) budget.Fail("the fill is one character");
  const int64_t total = std::max<int64_t>(width - self.As<Text>().length, 0);
  // As CPython: the odd one of a centred text goes left if the width is odd.
  const int64_t left = kAlign == Align::kLeft    ? 0
                       : kAlign == Align::kRight ? total
                                                 : total / 2 + (total & width & 1);
  budget.CheckRoom(total);
  budget.CheckRoom(total * static_cast<int64_t>(fill.size()));
  budget.ChargeBytes(total * fill.size());
  std::string out;
  for (int64_t i = 0; i < left; ++i) out += fill;
  out += self.text();
  for (int64_t i = left; i < total; ++i) out += fill;
  return MakeString(budget, std::move(out));
}

MethodTable MakeTextMethods() {
  return {
      {"upper", Convert<ToUpper>},
      {"lower", Convert<ToLower>},
      {"title", Convert<ToTitle>},
      {"capitalize", Convert<Capitalize>},
      {"strip", StripMethod<true, true>},
      {"lstrip", StripMethod<true, false>},
      {"rstrip", StripMethod<false, true>},
      {"split", SplitMethod<false>},
      {"rsplit", SplitMethod<true>},
      {"splitlines", SplitLinesMethod},
      {"startswith", HasEnd<true>},
      {"endswith", HasEnd<false>},
      {"find", Find<false, false>},
      {"rfind", Find<true, false>},
      {"index", Find<false, true>},
      {"rindex", Find<true, true>},
      {"count", Count},
      {"replace", ReplaceMethod},
      {"join", JoinMethod},
      {"removeprefix", RemoveEnd<true>},
      {"removesuffix", RemoveEnd<false>},
      {"partition", Partition<false>},
      {"rpartition", Partition<true>},
      {"ljust", Pad<Align::kLeft>},
      {"rjust", Pad<Align::kRight>},
      {"center", Pad<Align::kCenter>},
      {"isalpha", Is<Property::kAlpha>},
      {"isalnum", Is<Property::kAlnum>},
      {"isdecimal", Is<Property::kDecimal>},
      {"isdigit", Is<Property::kDigit>},
      {"isnumeric", Is<Property::kNumeric>},
      {"islower", Is<Property::kLower>},
      {"isupper", Is<Property::kUpper>},
      {"isspace", Is<Property::kSpace>},
  };
}

// --- dicts, lists, tuples, loop ---------------------------------------------------------------

Value Get(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "get", args, {"/key", "/default"}, 1);
  if (const Value* value = self.As<Dict>().Find(*bound[0]); value != nullptr) return *value;
  return bound[1] != nullptr ? *bound[1] : Value::None();
}

template <View::Part kPart>
Value ViewMethod(Interpreter& in, const Value& self, const Args& args) {
  Bind(in.budget(), "method", args, {});
  return Value(Kind::kView, std::make_shared<View>(in.budget(), self, kPart));
}

// Nothing can change a value, so that it is its own copy.
Value Copy(Interpreter& in, const Value& self, const Args& args) {
  Bind(in.budget(), "copy", args, {});
  return self;
}

Value CountItem(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "count", args, {"/value"}, 1);
  int64_t count = 0;
  for (const Value& item : self.items()) count += Equal(in.budget(), item, *bound[0]);
  return Value::Int(count);
}

Value IndexOf(Interpreter& in, const Value& self, const Args& args) {
  const auto bound = Bind(in.budget(), "index", args, {"/value"}, 1);
  for (size_t i = 0; i < self.items().size(); ++i) {
    if (Equal(in.budget(), self.items()[i], *bound[0])) return Value::Int(i);
  }
  in.budget().Fail("index: the value is not there");
}

Value Cycle(Interpreter& in, const Value& self, const Args& args) {
  if (args.positional.empty() || !args.keywords.empty()) in.budget().Fail("cycle: no values");
  return args.positional[self.As<Loop>().index0() % args.positional.size()];
}

Value Changed(Interpreter& in, const Value& self, const Args& args) {
  if (!args.keywords.empty()) in.budget().Fail("changed: values have no names");
  return Value::Bool(self.As<Loop>().Changed(MakeTuple(in.budget(), args.positional)));
}

const MethodTable& Methods(Kind kind) {
  static const MethodTable none, text = MakeTextMethods();
  static const MethodTable dict = {{"get", Get},
                                   {"keys", ViewMethod<View::kKeys>},
                                   {"values", ViewMethod<View::kValues>},
                                   {"items", ViewMethod<View::kItems>},
                                   {"copy", Copy}};
  static const MethodTable list = {{"count", CountItem}, {"index", IndexOf}, {"copy", Copy}};
  static const MethodTable tuple = {{"count", CountItem}, {"index", IndexOf}};
  static const MethodTable loop = {{"cycle", Cycle}, {"changed", Changed}};
  switch (kind) {
    case Kind::kString:
      return text;
    case Kind::kDict:
      return dict;
    case Kind::kList:
      return list;
    case Kind::kTuple:
      return tuple;
    case Kind::kLoop:
      return loop;
    default:
      return none;
  }
}

bool In(std::string_view name, std::initializer_list<std::string_view> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

}  // namespace

Native FindMethod(Kind kind, std::string_view name) {
  const MethodTable& table = Methods(kind);
  const auto it = table.find(name);
  return it == table.end() ? nullptr : it->second;
}

bool IsUnsafeMethod(Kind kind, std::string_view name) {
  if (kind == Kind::kList) {
    return In(name, {"append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"});
  }
  return kind == Kind::kDict && In(name, {"clear", "pop", "popitem", "setdefault", "update"});
}

bool IsUnsupportedMethod(Kind kind, std::string_view name) {
  switch (kind) {
    case Kind::kString:
      return In(name, {"casefold", "encode", "expandtabs", "format", "format_map", "isascii",
                       "isidentifier", "isprintable", "istitle", "maketrans", "swapcase",
                       "translate", "zfill"});
    case Kind::kDict:
      return name == "fromkeys";
    case Kind::kTuple:
      return In(name, {"grouper", "list"});
    case Kind::kBool:
    case Kind::kInt:
      return In(name, {"as_integer_ratio", "bit_count", "bit_length", "conjugate", "denominator",
                       "from_bytes", "imag", "numerator", "real", "to_bytes"});
    case Kind::kFloat:
      return In(name,
                {"as_integer_ratio", "conjugate", "fromhex", "hex", "imag", "is_integer", "real"});
    case Kind::kRange:
      return In(name, {"count", "index", "start", "step", "stop"});
    case Kind::kView:
      return In(name, {"isdisjoint", "mapping"});
    case Kind::kMacro:
      return In(name, {"arguments", "caller", "catch_kwargs", "catch_varargs", "explicit_caller"});
    case Kind::kFunction:
      return name == "fromkeys";
    default:
      return false;
  }
}

}  // namespace detour::data::jinja
