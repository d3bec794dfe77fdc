#include "data/jinja_filters.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "data/jinja_text.h"

namespace detour::data::jinja {
namespace {

// str(value), with the steps for `factor` times its length.
std::string TextOf(Interpreter& in, const Value& value, int factor = 1) {
  std::string text = ToString(in.budget(), value);
  in.budget().ChargeBytes(text.size(), IsAscii(text) ? factor : 8 * factor);
  return text;
}

template <std::string (*kConvert)(std::string_view)>
Value Convert(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "filter", args, {});
  return MakeString(in.budget(), kConvert(TextOf(in, value)));
}

Value Trim(Interpreter& in, const Value& value, const Args& args) {
  const auto bound = Bind(in.budget(), "trim", args, {"chars"});
  const std::string text = TextOf(in, value);
  std::optional<std::string_view> chars;
  if (bound[0] != nullptr && !bound[0]->is(Kind::kNone)) {
    if (!bound[0]->is_string()) in.budget().Fail("trim: the characters are no text");
    in.budget().ChargeBytes(bound[0]->text().size(), 4);
    chars = bound[0]->text();
  }
  return MakeString(in.budget(), std::string(Strip(text, chars, true, true)));
}

Value ReplaceFilter(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "replace", args, {"old", "new", "count"}, 2);
  const bool all = bound[2] == nullptr || bound[2]->is(Kind::kNone);
  const int64_t count = all ? -1 : IntegerArg(budget, bound[2], -1);
  const std::string text = TextOf(in, value, 8), old = TextOf(in, *bound[0]);
  std::optional<std::string> out =
      Replace(text, old, TextOf(in, *bound[1]), count, budget.room_bytes());
  if (!out) budget.Fail("values of more than {} bytes", budget.limits().max_memory_bytes);
  return MakeString(budget, std::move(*out));
}

Value Indent(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "indent", args, {"width", "first", "blank"});
  if (value.is_undefined()) FailUndefined(budget, value);
  if (!value.is_string()) budget.Fail("indent: text expected, got {}", KindName(value.kind()));
  std::string margin;
  if (bound[0] != nullptr && bound[0]->is_string()) {
    margin = bound[0]->text();
  } else {
    const int64_t width = std::max<int64_t>(IntegerArg(budget, bound[0], 4), 0);
    budget.CheckRoom(width);
    margin.assign(width, ' ');
  }
  const bool first = BoolArg(bound[1], false), blank = BoolArg(bound[2], false);
  budget.ChargeBytes(value.text().size(), 2);
  const std::string text = value.text() + "\n";
  std::string out = first ? margin : "";
  bool begin = true;
  for (const std::string_view line : SplitLines(text, false)) {
    const bool indented = !begin && (blank || !line.empty());
    budget.CheckRoom(out.size() + line.size() + margin.size() + 1);
    budget.ChargeBytes(line.size() + margin.size());
    if (!begin) out += '\n';
    if (indented) out += margin;
    out += line;
    begin = false;
  }
  return MakeString(budget, std::move(out));
}

Value Default(Interpreter& in, const Value& value, const Args& args) {
  const auto bound = Bind(in.budget(), "default", args, {"default_value", "boolean"});
  if (!value.is_undefined() && !(BoolArg(bound[1], false) && !Truthy(value))) return value;
  return bound[0] != nullptr ? *bound[0] : MakeString(in.budget(), "");
}

Value LengthFilter(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "length", args, {});
  if (value.is(Kind::kLoop)) return Value::Int(value.As<Loop>().Length());
  const std::optional<int64_t> length = Length(value);
  if (!length) in.budget().Fail("{} has no length", KindName(value.kind()));
  return Value::Int(*length);
}

Value ToJsonFilter(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound =
      Bind(budget, "tojson", args, {"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  style.ensure_ascii = BoolArg(bound[0], false);
  style.sort_keys = BoolArg(bound[3], false);
  if (bound[1] != nullptr && !bound[1]->is(Kind::kNone)) {
    style.item_separator.assign(1, ',');
    if (bound[1]->is_string()) {
      style.indent = bound[1]->text();
    } else {
      const int64_t width = std::max<int64_t>(IntegerArg(budget, bound[1], 0), 0);
      budget.CheckRoom(width);
      style.indent = std::string(width, ' ');
    }
  }
  if (bound[2] != nullptr && !bound[2]->is(Kind::kNone)) {
    const std::vector<Value> parts = ToVector(budget, *bound[2]);
    if (parts.size() != 2 || !parts[0].is_string() || !parts[1].is_string()) {
      budget.Fail("tojson: separators are two strings");
    }
    style.item_separator = parts[0].text();
    style.key_separator = parts[1].text();
  }
  return MakeString(budget, ToJson(budget, value, style));
}

Value StringFilter(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "string", args, {});
  return value.is_string() ? value : MakeString(in.budget(), ToString(in.budget(), value));
}

// int() of a float.
Value Truncate(Interpreter& in, double number) {
  if (!(std::abs(number) < 0x1p63)) in.budget().Fail("an integer of more than 64 bits");
  return Value::Int(static_cast<int64_t>(number));
}

Value IntFilter(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "int", args, {"default", "base"});
  const Value fallback = bound[0] != nullptr ? *bound[0] : Value::Int(0);
  if (value.is_undefined()) FailUndefined(budget, value);
  if (value.is_integer()) return Value::Int(value.integer());
  if (value.is(Kind::kFloat)) {
    return std::isnan(value.number()) ? fallback : Truncate(in, value.number());
  }
  if (!value.is_string()) return fallback;
  budget.ChargeBytes(value.text().size(), 2);
  const int64_t base = bound[1] == nullptr ? 10 : bound[1]->is_integer() ? bound[1]->integer() : -1;
  if (base == 0 || (base >= 2 && base <= 36)) {
    bool overflow = false;
    const auto integer = ParsePythonInt(value.text(), static_cast<int>(base), &overflow);
    if (integer) return Value::Int(*integer);
    if (overflow) budget.Fail("an integer of more than 64 bits");
  }
  const std::optional<double> number = ParsePythonFloat(value.text());
  return number && std::isfinite(*number) ? Truncate(in, *number) : fallback;
}

Value FloatFilter(Interpreter& in, const Value& value, const Args& args) {
  const auto bound = Bind(in.budget(), "float", args, {"default"});
  if (value.is_undefined()) FailUndefined(in.budget(), value);
  if (value.is_number()) return Value::Float(value.number());
  if (value.is_string()) {
    in.budget().ChargeBytes(value.text().size(), 2);
    if (const auto number = ParsePythonFloat(value.text())) return Value::Float(*number);
  }
  return bound[0] != nullptr ? *bound[0] : Value::Float(0);
}

Value Abs(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "abs", args, {});
  if (value.is_undefined()) FailUndefined(in.budget(), value);
  if (!value.is_number()) in.budget().Fail("abs: a number expected");
  if (value.is(Kind::kFloat)) return Value::Float(std::abs(value.number()));
  return value.integer() < 0 ? Negate(in.budget(), value) : Value::Int(value.integer());
}

// round(value, precision), to even where two are equally near.
Value RoundCommon(Interpreter& in, const Value& value, int64_t precision) {
  Budget& budget = in.budget();
  if (precision < 0) budget.Fail("round: a negative precision is not supported");
  if (value.is_integer()) return Value::Int(value.integer());
  const double number = value.number();
  // printf rounds the exact binary value, as Python does.
  if (precision > 320 || !std::isfinite(number)) return value;
  const std::string text = fmt::format("{:.{}f}", number, precision);
  return Value::Float(*ParsePythonFloat(text));
}

Value Round(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "round", args, {"precision", "method"});
  const std::string method = bound[1] == nullptr ? "common" : ToString(budget, *bound[1]);
  if (method != "common" && method != "ceil" && method != "floor") {
    budget.Fail("round: the method is common, ceil or floor");
  }
  if (value.is_undefined()) FailUndefined(budget, value);
  if (!value.is_number()) budget.Fail("round: a number expected");
  const int64_t precision = IntegerArg(budget, bound[0], 0);
  if (method == "common") return RoundCommon(in, value, precision);
  const Value factor = Arithmetic(budget, "**", Value::Int(10), Value::Int(precision));
  Value scaled = Arithmetic(budget, "*", value, factor);
  if (scaled.is(Kind::kFloat)) {
    scaled =
        Truncate(in, method == "ceil" ? std::ceil(scaled.number()) : std::floor(scaled.number()));
  }
  return Arithmetic(budget, "/", scaled, factor);
}

Value Attr(Interpreter& in, const Value& value, const Args& args) {
  const auto bound = Bind(in.budget(), "attr", args, {"name"}, 1);
  if (!bound[0]->is_string()) in.budget().Fail("attr: the name is no text");
  // Unlike ".", not the key of a dict.
  if (value.is(Kind::kDict) && FindMethod(Kind::kDict, bound[0]->text()) == nullptr) {
    return MakeUndefined(in.budget(), "no such attribute");
  }
  return in.GetAttribute(value, bound[0]->text());
}

}  // namespace

const FilterTable& ScalarFilters() {
  static const FilterTable table = {
      {"upper", Convert<ToUpper>},
      {"lower", Convert<ToLower>},
      {"capitalize", Convert<Capitalize>},
      {"title", Convert<TitleFilter>},
      {"trim", Trim},
      {"replace", ReplaceFilter},
      {"indent", Indent},
      {"default", Default},
      {"d", Default},
      {"length", LengthFilter},
      {"count", LengthFilter},
      {"tojson", ToJsonFilter},
      {"string", StringFilter},
      {"safe", StringFilter},
      {"int", IntFilter},
      {"float", FloatFilter},
      {"abs", Abs},
      {"round", Round},
      {"attr", Attr},
  };
  return table;
}

Native FindFilter(std::string_view name) {
  for (const FilterTable* table : {&ScalarFilters(), &SequenceFilters()}) {
    if (const auto it = table->find(name); it != table->end()) return it->second;
  }
  return nullptr;
}

bool IsUnsupportedFilter(std::string_view name) {
  static constexpr std::string_view kNames[] = {
      "batch",  "center",    "e",        "escape",    "filesizeformat", "forceescape",
      "format", "pprint",    "random",   "slice",     "striptags",      "truncate",
      "urlize", "urlencode", "wordwrap", "wordcount", "xmlattr"};
  return std::find(std::begin(kNames), std::end(kNames), name) != std::end(kNames);
}

}  // namespace detour::data::jinja
