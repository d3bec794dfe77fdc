#include <algorithm>

#include "core/json.h"
#include "data/jinja_filters.h"
#include "data/jinja_text.h"

namespace detour::data::jinja {
namespace {

int DepthOf(const Value& value) { return value.object() == nullptr ? 0 : value.object()->depth; }

int DepthOf(const Value& value, const Args& args) {
  int depth = DepthOf(value);
  for (const Value& argument : args.positional) depth = std::max(depth, DepthOf(argument));
  for (const auto& [key, argument] : args.keywords) depth = std::max(depth, DepthOf(argument));
  return depth;
}

// The value of an attribute such as "a.b.0"; without one the item itself.
class Getter {
 public:
  Getter(Interpreter& in, const Value* attribute, bool ignore_case, const Value* fallback = nullptr)
      : in_(in), ignore_case_(ignore_case) {
    if (fallback != nullptr && !fallback->is(Kind::kNone)) fallback_ = *fallback;
    if (attribute == nullptr || attribute->is(Kind::kNone)) return;
    if (!attribute->is_string()) {
      parts_.push_back(*attribute);
      return;
    }
    for (const std::string_view part : Split(attribute->text(), ".", -1, false)) {
      bool overflow = false;
      const bool digits = !part.empty() && std::all_of(part.begin(), part.end(),
                                                       [](char c) { return c >= '0' && c <= '9'; });
      const auto number = digits ? ParsePythonInt(part, 10, &overflow) : std::nullopt;
      parts_.push_back(number ? Value::Int(*number) : MakeString(in.budget(), std::string(part)));
    }
  }

  Value Get(Value item, bool may_ignore_case = true) const {
    for (const Value& part : parts_) {
      in_.budget().Charge(1);
      item = in_.GetItem(item, part);
      if (fallback_ && item.is_undefined()) item = *fallback_;
    }
    if (ignore_case_ && may_ignore_case && item.is_string()) {
      in_.budget().ChargeBytes(item.text().size(), item.As<Text>().ascii() ? 1 : 8);
      return MakeString(in_.budget(), ToLower(item.text()));
    }
    return item;
  }

 private:
  Interpreter& in_;
  const bool ignore_case_;
  std::optional<Value> fallback_;
  std::vector<Value> parts_;
};

// A filter whose items are computed one by one. `Derived` has Start(), called before the first
// item and only if the value is true, and Step(item, out): whether there is something to yield.
template <typename Derived>
class LazyFilter : public Iterator {
 public:
  LazyFilter(Interpreter& in, Value value, Args args)
      : in_(in), value_(std::move(value)), args_(std::move(args)) {}

  static Value Make(Interpreter& in, const Value& value, const Args& args) {
    return MakeGenerator(in.budget(), std::make_unique<Derived>(in, value, args),
                         DepthOf(value, args));
  }

  bool Next(Value* out) override {
    auto& self = static_cast<Derived&>(*this);
    if (!started_) {
      started_ = true;
      if (Truthy(value_) || Derived::kWalksFalse) {
        self.Start();
        items_ = Iterate(in_.budget(), value_);
      }
    }
    if (items_ == nullptr) return false;
    Value item;
    while (items_->Next(&item)) {
      if (self.Step(std::move(item), out)) return true;
    }
    items_ = nullptr;
    return false;
  }

 protected:
  Interpreter& in_;
  Value value_;
  Args args_;

 private:
  bool started_ = false;
  std::unique_ptr<Iterator> items_;
};

class MapFilter : public LazyFilter<MapFilter> {
 public:
  static constexpr bool kWalksFalse = false;
  using LazyFilter::LazyFilter;

  void Start() {
    const auto find = [&](std::string_view name) -> const Value* {
      for (const auto& [key, value] : args_.keywords) {
        if (key == name) return &value;
      }
      return nullptr;
    };
    const Value* attribute = find("attribute");
    if (args_.positional.empty() && attribute != nullptr) {
      const Value* fallback = find("default");
      if (args_.keywords.size() > (fallback != nullptr ? 2 : 1)) {
        in_.budget().Fail("map: unexpected arguments beside attribute and default");
      }
      getter_.emplace(in_, attribute, false, fallback);
      return;
    }
    if (args_.positional.empty()) in_.budget().Fail("map: the name of a filter is missing");
    if (!args_.positional[0].is_string()) in_.budget().Fail("map: the filter's name is no text");
    name_ = args_.positional[0].text();
    rest_.positional.assign(args_.positional.begin() + 1, args_.positional.end());
    rest_.keywords = args_.keywords;
  }
  bool Step(Value item, Value* out) {
    *out = getter_ ? getter_->Get(std::move(item)) : in_.CallFilter(name_, item, rest_);
    return true;
  }

 private:
  std::optional<Getter> getter_;
  std::string name_;
  Args rest_;
};

template <bool kSelect, bool kAttribute>
class SelectFilter : public LazyFilter<SelectFilter<kSelect, kAttribute>> {
 public:
  using Base = LazyFilter<SelectFilter>;
  static constexpr bool kWalksFalse = false;
  using Base::Base;

  void Start() {
    auto& positional = this->args_.positional;
    Budget& budget = this->in_.budget();
    if (kAttribute && positional.empty()) budget.Fail("the attribute's name is missing");
    if (kAttribute) getter_.emplace(this->in_, &positional[0], false);
    const size_t skip = kAttribute ? 1 : 0;
    if (positional.size() <= skip) return;
    if (!positional[skip].is_string()) budget.Fail("the test's name is no text");
    name_ = positional[skip].text();
    rest_.positional.assign(positional.begin() + skip + 1, positional.end());
    rest_.keywords = this->args_.keywords;
  }
  bool Step(Value item, Value* out) {
    const Value tested = getter_ ? getter_->Get(item) : item;
    const bool result = name_ ? this->in_.CallTest(*name_, tested, rest_) : Truthy(tested);
    *out = std::move(item);
    return result == kSelect;
  }

 private:
  std::optional<Getter> getter_;
  std::optional<std::string> name_;
  Args rest_;
};

class UniqueFilter : public LazyFilter<UniqueFilter> {
 public:
  static constexpr bool kWalksFalse = true;
  using LazyFilter::LazyFilter;

  void Start() {
    const auto bound = Bind(in_.budget(), "unique", args_, {"case_sensitive", "attribute"});
    getter_.emplace(in_, bound[1], !BoolArg(bound[0], false));
  }
  bool Step(Value item, Value* out) {
    const Value key = getter_->Get(item);
    if (seen_ == nullptr) seen_ = std::make_shared<Dict>(in_.budget());
    if (seen_->Find(key) != nullptr) return false;
    seen_->Set(key, Value::None());
    *out = std::move(item);
    return true;
  }

 private:
  std::optional<Getter> getter_;
  std::shared_ptr<Dict> seen_;
};

class ItemsFilter : public LazyFilter<ItemsFilter> {
 public:
  static constexpr bool kWalksFalse = true;
  using LazyFilter::LazyFilter;

  void Start() {
    if (value_.is_undefined()) return;
    if (!value_.is(Kind::kDict)) in_.budget().Fail("items: a dict expected");
    value_ = Value(Kind::kView, std::make_shared<View>(in_.budget(), value_, View::kItems));
  }
  bool Step(Value item, Value* out) {
    *out = std::move(item);
    return true;
  }
};

Value Items(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "items", args, {});
  return ItemsFilter::Make(in, value, args);
}

Value List(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "list", args, {});
  return MakeList(in.budget(), ToVector(in.budget(), value));
}

Value First(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "first", args, {});
  Value out;
  if (Iterate(in.budget(), value)->Next(&out)) return out;
  return MakeUndefined(in.budget(), "No first item, sequence was empty.");
}

// What reversed() takes.
bool IsReversible(const Value& value) { return Length(value).has_value(); }

Value Last(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "last", args, {});
  if (!IsReversible(value)) in.budget().Fail("last: no end of {}", KindName(value.kind()));
  const int64_t length = *Length(value);
  if (length == 0) return MakeUndefined(in.budget(), "No last item, sequence was empty.");
  if (!value.is(Kind::kDict) && !value.is(Kind::kView)) {
    return *Element(in.budget(), value, length - 1);
  }
  return ToVector(in.budget(), value).back();
}

Value Reverse(Interpreter& in, const Value& value, const Args& args) {
  Bind(in.budget(), "reverse", args, {});
  if (value.is_string()) {
    return Slice(in.budget(), value, Value::None(), Value::None(), Value::Int(-1));
  }
  std::vector<Value> items = ToVector(in.budget(), value);
  std::reverse(items.begin(), items.end());
  const Value list = MakeList(in.budget(), std::move(items));
  if (!IsReversible(value)) return list;
  return MakeGenerator(in.budget(), Iterate(in.budget(), list), DepthOf(list));
}

Value Join(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "join", args, {"d", "attribute"});
  const std::string separator = bound[0] == nullptr ? "" : ToString(budget, *bound[0]);
  const Getter getter(in, bound[1], false);
  const std::unique_ptr<Iterator> iterator = Iterate(budget, value);
  std::string out;
  bool first = true;
  for (Value item; iterator->Next(&item);) {
    const std::string part = ToString(budget, getter.Get(item));
    budget.CheckRoom(out.size() + part.size() + separator.size());
    budget.ChargeBytes(separator.size());
    if (!first) out += separator;
    first = false;
    out += part;
  }
  return MakeString(budget, std::move(out));
}

struct Keyed {
  Value key, item;
};

void StableSort(Budget& budget, bool reverse, std::vector<Keyed>* items) {
  std::stable_sort(items->begin(), items->end(), [&](const Keyed& a, const Keyed& b) {
    return reverse ? Less(budget, b.key, a.key) : Less(budget, a.key, b.key);
  });
}

Value TakeItems(Budget& budget, std::vector<Keyed> keyed) {
  std::vector<Value> out;
  for (Keyed& entry : keyed) out.push_back(std::move(entry.item));
  return MakeList(budget, std::move(out));
}

Value Sort(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "sort", args, {"reverse", "case_sensitive", "attribute"});
  const bool ignore_case = !BoolArg(bound[1], false);
  // "a,b": by a, then by b.
  std::vector<Getter> getters;
  if (bound[2] != nullptr && bound[2]->is_string()) {
    for (const std::string_view part : Split(bound[2]->text(), ",", -1, false)) {
      const Value name = MakeString(budget, std::string(part));
      getters.emplace_back(in, &name, ignore_case);
    }
  } else {
    getters.emplace_back(in, bound[2], ignore_case);
  }
  std::vector<Keyed> keyed;
  for (Value& item : ToVector(budget, value)) {
    std::vector<Value> key;
    for (const Getter& getter : getters) key.push_back(getter.Get(item));
    keyed.push_back({MakeList(budget, std::move(key)), std::move(item)});
  }
  StableSort(budget, BoolArg(bound[0], false), &keyed);
  return TakeItems(budget, std::move(keyed));
}

Value DictSort(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "dictsort", args, {"case_sensitive", "by", "reverse"});
  const std::string by = bound[1] == nullptr ? "key" : ToString(budget, *bound[1]);
  if (by != "key" && by != "value") budget.Fail("dictsort: by is \"key\" or \"value\"");
  if (value.is_undefined()) FailUndefined(budget, value);
  if (!value.is(Kind::kDict)) budget.Fail("dictsort: a dict expected");
  const Getter getter(in, nullptr, !BoolArg(bound[0], false));
  std::vector<Keyed> keyed;
  for (const auto& [key, item] : value.As<Dict>().items) {
    keyed.push_back({getter.Get(by == "key" ? key : item), MakeTuple(budget, {key, item})});
  }
  StableSort(budget, BoolArg(bound[2], false), &keyed);
  return TakeItems(budget, std::move(keyed));
}

Value GroupBy(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "groupby", args, {"attribute", "default", "case_sensitive"}, 1);
  const Getter getter(in, bound[0], !BoolArg(bound[2], false), bound[1]);
  std::vector<Keyed> keyed;
  for (Value& item : ToVector(budget, value)) {
    Value key = getter.Get(item);
    keyed.push_back({std::move(key), std::move(item)});
  }
  StableSort(budget, false, &keyed);
  std::vector<Value> out;
  for (size_t begin = 0; begin < keyed.size();) {
    size_t end = begin;
    std::vector<Value> group;
    while (end < keyed.size() &&
           (end == begin || Equal(budget, keyed[end].key, keyed[begin].key))) {
      group.push_back(keyed[end++].item);
    }
    // The first item's own key, with its case.
    out.push_back(MakeTuple(
        budget, {getter.Get(keyed[begin].item, false), MakeList(budget, std::move(group))}));
    begin = end;
  }
  return MakeList(budget, std::move(out));
}

template <bool kMax>
Value Extreme(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, kMax ? "max" : "min", args, {"case_sensitive", "attribute"});
  const Getter getter(in, bound[1], !BoolArg(bound[0], false));
  const std::unique_ptr<Iterator> iterator = Iterate(budget, value);
  Value best, best_key, item;
  if (!iterator->Next(&best)) {
    return MakeUndefined(budget, "No aggregated item, sequence was empty.");
  }
  best_key = getter.Get(best);
  while (iterator->Next(&item)) {
    Value key = getter.Get(item);
    if (kMax ? !Less(budget, best_key, key) : !Less(budget, key, best_key)) continue;
    best = std::move(item);
    best_key = std::move(key);
  }
  return best;
}

Value Sum(Interpreter& in, const Value& value, const Args& args) {
  Budget& budget = in.budget();
  const auto bound = Bind(budget, "sum", args, {"attribute", "start"});
  const Getter getter(in, bound[0], false);
  Value out = bound[1] == nullptr ? Value::Int(0) : *bound[1];
  if (out.is_string()) budget.Fail("sum: text cannot be summed");
  const std::unique_ptr<Iterator> iterator = Iterate(budget, value);
  for (Value item; iterator->Next(&item);) {
    out = Arithmetic(budget, "+", out, getter.Get(std::move(item)));
  }
  return out;
}

}  // namespace

const FilterTable& SequenceFilters() {
  static const FilterTable table = {
      {"map", MapFilter::Make},
      {"select", SelectFilter<true, false>::Make},
      {"reject", SelectFilter<false, false>::Make},
      {"selectattr", SelectFilter<true, true>::Make},
      {"rejectattr", SelectFilter<false, true>::Make},
      {"unique", UniqueFilter::Make},
      {"items", Items},
      {"list", List},
      {"first", First},
      {"last", Last},
      {"reverse", Reverse},
      {"join", Join},
      {"sort", Sort},
      {"dictsort", DictSort},
      {"groupby", GroupBy},
      {"min", Extreme<false>},
      {"max", Extreme<true>},
      {"sum", Sum},
  };
  return table;
}

}  // namespace detour::data::jinja
