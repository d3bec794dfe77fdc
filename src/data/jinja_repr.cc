// str(), repr() and json.dumps() of values.
#include <algorithm>
#include <cmath>

#include "data/jinja_interpreter.h"
#include "data/jinja_text.h"
#include "data/jinja_value.h"

namespace detour::data::jinja {
namespace {

void Append(Budget& budget, std::string_view part, std::string* out) {
  budget.ChargeBytes(part.size());
  budget.CheckRoom(out->size() + part.size());
  *out += part;
}

void AppendRepr(Budget& budget, const Value& value, std::string* out);

template <typename Items>
void AppendItems(Budget& budget, const char* begin, const Items& items, const char* end,
                 std::string* out) {
  Append(budget, begin, out);
  bool first = true;
  for (const auto& item : items) {
    if (!first) *out += ", ";
    first = false;
    if constexpr (std::is_same_v<std::decay_t<decltype(item)>, Value>) {
      AppendRepr(budget, item, out);
    } else {
      AppendRepr(budget, item.first, out);
      *out += ": ";
      AppendRepr(budget, item.second, out);
    }
  }
  Append(budget, end, out);
}

void AppendView(Budget& budget, const Value& value, std::string* out) {
  static constexpr const char* kNames[] = {"dict_keys([", "dict_values([", "dict_items(["};
  AppendItems(budget, kNames[value.As<View>().part], ToVector(budget, value), "])", out);
}

void AppendRepr(Budget& budget, const Value& value, std::string* out) {
  DepthGuard guard(budget);
  budget.Charge(1);
  switch (value.kind()) {
    case Kind::kUndefined:
      return Append(budget, "Undefined", out);
    case Kind::kString:
      budget.ChargeBytes(value.text().size(), value.As<Text>().ascii() ? 2 : 8);
      return Append(budget, StringRepr(value.text()), out);
    case Kind::kList:
      return AppendItems(budget, "[", value.items(), "]", out);
    case Kind::kTuple:
      return AppendItems(budget, "(", value.items(), value.items().size() == 1 ? ",)" : ")", out);
    case Kind::kDict:
      return AppendItems(budget, "{", value.As<Dict>().items, "}", out);
    case Kind::kNamespace:
      return AppendItems(budget, "<Namespace {", value.As<Namespace>().attributes.items, "}>", out);
    case Kind::kView:
      return AppendView(budget, value, out);
    default:
      return Append(budget, ToString(budget, value), out);
  }
}

class JsonWriter {
 public:
  JsonWriter(Budget& budget, const JsonStyle& style) : budget_(budget), style_(style) {}

  std::string Run(const Value& value) {
    Write(value);
    return std::move(out_);
  }

 private:
  void Put(std::string_view text) { Append(budget_, text, &out_); }

  void Break() {
    if (!style_.indent) return;
    Put("\n");
    for (int i = 0; i < level_; ++i) Put(*style_.indent);
  }

  void Write(const Value& value) {
    DepthGuard guard(budget_);
    budget_.Charge(1);
    switch (value.kind()) {
      case Kind::kString:
        budget_.ChargeBytes(value.text().size(), 2);
        return Put(JsonString(value.text(), style_.ensure_ascii));
      case Kind::kList:
      case Kind::kTuple: {
        const std::vector<Value>& items = value.items();
        if (items.empty()) return Put("[]");
        Put("[");
        ++level_;
        for (size_t i = 0; i < items.size(); ++i) {
          if (i > 0) Put(style_.item_separator);
          Break();
          Write(items[i]);
        }
        --level_;
        Break();
        return Put("]");
      }
      case Kind::kDict:
        return WriteDict(value.As<Dict>());
      default:
        Put(Scalar(value, "is not JSON"));
    }
  }

  std::string Scalar(const Value& value, const char* otherwise) {
    switch (value.kind()) {
      case Kind::kNone:
        return "null";
      case Kind::kBool:
        return value.integer() != 0 ? "true" : "false";
      case Kind::kInt:
        return fmt::format("{}", value.integer());
      case Kind::kFloat:
        if (std::isnan(value.number())) return "NaN";
        if (std::isinf(value.number())) return value.number() < 0 ? "-Infinity" : "Infinity";
        return FloatRepr(value.number());
      default:
        budget_.Fail("{} {}", KindName(value.kind()), otherwise);
    }
  }

  void WriteDict(const Dict& dict) {
    if (dict.items.empty()) return Put("{}");
    std::vector<const std::pair<Value, Value>*> items;
    budget_.Charge(dict.items.size());
    for (const auto& item : dict.items) items.push_back(&item);
    if (style_.sort_keys) {
      std::stable_sort(items.begin(), items.end(), [&](const auto* a, const auto* b) {
        return Less(budget_, a->first, b->first);
      });
    }
    Put("{");
    ++level_;
    bool first = true;
    for (const auto* item : items) {
      if (!first) Put(style_.item_separator);
      first = false;
      Break();
      const Value& key = item->first;
      const std::string name =
          key.is_string() ? key.text() : Scalar(key, "cannot be a key of a JSON object");
      budget_.ChargeBytes(name.size(), 2);
      Put(JsonString(name, style_.ensure_ascii));
      Put(style_.key_separator);
      Write(item->second);
    }
    --level_;
    Break();
    Put("}");
  }

  Budget& budget_;
  const JsonStyle& style_;
  std::string out_;
  int level_ = 0;
};

}  // namespace

std::string ToString(Budget& budget, const Value& value) {
  switch (value.kind()) {
    case Kind::kUndefined:
      return "";
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return value.integer() != 0 ? "True" : "False";
    case Kind::kInt:
      return fmt::format("{}", value.integer());
    case Kind::kFloat:
      return FloatRepr(value.number());
    case Kind::kString:
      budget.ChargeBytes(value.text().size());
      return value.text();
    case Kind::kRange: {
      const Range& range = value.As<Range>();
      const int64_t stop = range.stop;
      return range.step == 1 ? fmt::format("range({}, {})", range.start, stop)
                             : fmt::format("range({}, {}, {})", range.start, stop, range.step);
    }
    case Kind::kMacro:
      if (value.As<Macro>().name().empty()) return "<Macro anonymous>";
      return fmt::format("<Macro {}>", StringRepr(value.As<Macro>().name()));
    case Kind::kLoop: {
      Loop& loop = value.As<Loop>();
      return fmt::format("<LoopContext {}/{}>", loop.index0() + 1, loop.Length());
    }
    case Kind::kGenerator:
    case Kind::kFunction:
      budget.Fail("{} has no text. Hint: \"|list\", or call it", KindName(value.kind()));
    default: {
      std::string out;
      AppendRepr(budget, value, &out);
      return out;
    }
  }
}

std::string Repr(Budget& budget, const Value& value) {
  std::string out;
  AppendRepr(budget, value, &out);
  return out;
}

std::string ToJson(Budget& budget, const Value& value, const JsonStyle& style) {
  return JsonWriter(budget, style).Run(value);
}

}  // namespace detour::data::jinja
