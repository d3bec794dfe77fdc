// Expressions, attributes and calls.
#include <algorithm>

#include "core/json.h"
#include "data/jinja_interpreter.h"

namespace detour::data::jinja {

Value Interpreter::Eval(const Expr& expr) {
  DepthGuard guard(budget_);
  budget_.line = expr.line;
  budget_.Charge(1);
  const auto child = [&](int i) { return Eval(*expr.children[i]); };
  switch (expr.op) {
    case Op::kConst:
      return constants_[expr.id];
    case Op::kName:
      return GetVariable(expr.id);
    case Op::kTuple:
    case Op::kList:
      return EvalSequence(expr);
    case Op::kDict:
      return EvalDict(expr);
    case Op::kAttr:
    case Op::kItem:
    case Op::kSlice:
      return EvalSlice(expr);
    case Op::kCall:
      return EvalCall(expr);
    case Op::kFilter:
      return EvalFilter(expr, nullptr);
    case Op::kTest: {
      const Value value = child(0);
      const Args args = EvalArgs(*expr.args);
      budget_.line = expr.line;
      return Value::Bool(CallTest(expr.text, value, args));
    }
    case Op::kNot:
      return Value::Bool(!Truthy(child(0)));
    case Op::kNeg: {
      const Value value = child(0);
      budget_.line = expr.line;
      return Negate(budget_, value);
    }
    case Op::kPos: {
      const Value value = child(0);
      budget_.line = expr.line;
      if (value.is_undefined()) FailUndefined(budget_, value);
      if (!value.is_number()) budget_.Fail("no \"+\" of {}", KindName(value.kind()));
      return value.is(Kind::kBool) ? Value::Int(value.integer()) : value;
    }
    case Op::kAnd: {
      Value left = child(0);
      return Truthy(left) ? child(1) : left;
    }
    case Op::kOr: {
      Value left = child(0);
      return Truthy(left) ? left : child(1);
    }
    case Op::kCond:
      return EvalCondition(expr);
    case Op::kCompare:
      return EvalCompare(expr);
    case Op::kBinary: {
      const Value left = child(0), right = child(1);
      budget_.line = expr.line;
      return Arithmetic(budget_, expr.text, left, right);
    }
    case Op::kConcat:
      return EvalConcat(expr);
  }
  return Value();
}

Value Interpreter::EvalSequence(const Expr& expr) {
  std::vector<Value> items;
  items.reserve(expr.children.size());
  for (const ExprPtr& child : expr.children) items.push_back(Eval(*child));
  return expr.op == Op::kList ? MakeList(budget_, std::move(items))
                              : MakeTuple(budget_, std::move(items));
}

Value Interpreter::EvalDict(const Expr& expr) {
  auto dict = std::make_shared<Dict>(budget_);
  for (size_t i = 0; i < expr.children.size(); i += 2) {
    const Value key = Eval(*expr.children[i]);
    Value value = Eval(*expr.children[i + 1]);
    budget_.line = expr.line;
    dict->Set(key, std::move(value));
  }
  return Value(Kind::kDict, std::move(dict));
}

// object.name, object[key] and object[a:b:c].
Value Interpreter::EvalSlice(const Expr& expr) {
  const Value object = Eval(*expr.children[0]);
  budget_.line = expr.line;
  if (expr.op == Op::kAttr) return GetAttribute(object, expr.text);
  std::vector<Value> bounds;
  for (size_t i = 1; i < expr.children.size(); ++i) {
    bounds.push_back(expr.children[i] == nullptr ? Value::None() : Eval(*expr.children[i]));
  }
  budget_.line = expr.line;
  if (expr.op == Op::kItem) return GetItem(object, bounds[0]);
  return Slice(budget_, object, bounds[0], bounds[1], bounds[2]);
}

Value Interpreter::EvalCall(const Expr& expr) {
  const Value callee = Eval(*expr.children[0]);
  const Args args = EvalArgs(*expr.args);
  budget_.line = expr.line;
  return Call(callee, args);
}

Value Interpreter::EvalCondition(const Expr& expr) {
  if (Truthy(Eval(*expr.children[0]))) return Eval(*expr.children[1]);
  if (expr.children[2] != nullptr) return Eval(*expr.children[2]);
  return MakeUndefined(budget_, "the inline if-expression evaluated to false and has no else");
}

Value Interpreter::EvalCompare(const Expr& expr) {
  Value left = Eval(*expr.children[0]);
  for (size_t i = 0; i < expr.operators.size(); ++i) {
    Value right = Eval(*expr.children[i + 1]);
    budget_.line = expr.line;
    if (!Compare(expr.operators[i], left, right)) return Value::Bool(false);
    left = std::move(right);
  }
  return Value::Bool(true);
}

bool Interpreter::Compare(std::string_view op, const Value& a, const Value& b) {
  if (op == "==") return Equal(budget_, a, b);
  if (op == "!=") return !Equal(budget_, a, b);
  if (op == "<" || op == "<=") return Less(budget_, a, b, op == "<=");
  if (op == ">" || op == ">=") return Less(budget_, b, a, op == ">=");
  return Contains(budget_, b, a) == (op == "in");
}

Value Interpreter::EvalConcat(const Expr& expr) {
  std::string text;
  std::vector<Value> parts;
  for (const ExprPtr& child : expr.children) parts.push_back(Eval(*child));
  budget_.line = expr.line;
  for (const Value& part : parts) {
    const std::string piece = ToString(budget_, part);
    budget_.CheckRoom(text.size() + piece.size());
    text += piece;
  }
  return MakeString(budget_, std::move(text));
}

Value Interpreter::EvalFilter(const Expr& expr, const Value* block) {
  // In a filter block the innermost filter has no value of its own.
  const Value value = expr.children[0] == nullptr ? *block
                      : expr.children[0]->op == Op::kFilter && block != nullptr
                          ? EvalFilter(*expr.children[0], block)
                          : Eval(*expr.children[0]);
  const Args args = EvalArgs(*expr.args);
  budget_.line = expr.line;
  return CallFilter(expr.text, value, args);
}

Args Interpreter::EvalArgs(const CallArgs& call) {
  Args args;
  for (const ExprPtr& expr : call.positional) args.positional.push_back(Eval(*expr));
  for (const auto& [key, expr] : call.keywords) args.keywords.emplace_back(key, Eval(*expr));
  if (call.star != nullptr) {
    for (Value& value : ToVector(budget_, Eval(*call.star))) {
      args.positional.push_back(std::move(value));
    }
  }
  if (call.star_star != nullptr) {
    const Value more = Eval(*call.star_star);
    if (!more.is(Kind::kDict)) budget_.Fail("** needs a dict, not {}", KindName(more.kind()));
    for (const auto& [key, value] : more.As<Dict>().items) {
      if (!key.is_string()) budget_.Fail("** needs names, not {}", KindName(key.kind()));
      for (const auto& [other, unused] : args.keywords) {
        if (other == key.text()) budget_.Fail("an argument of a call occurs twice");
      }
      budget_.Charge(1 + args.keywords.size());
      args.keywords.emplace_back(key.text(), value);
    }
  }
  return args;
}

Value Interpreter::Call(const Value& callee, const Args& args) {
  DepthGuard guard(budget_);
  switch (callee.kind()) {
    case Kind::kUndefined:
      FailUndefined(budget_, callee);
    case Kind::kFunction: {
      const Function& function = callee.As<Function>();
      return function.native(*this, function.self, args);
    }
    case Kind::kMacro:
      return CallMacro(callee.As<Macro>(), args);
    case Kind::kLoop:
      budget_.Fail("recursive loops are not supported");
    default:
      budget_.Fail("{} cannot be called", KindName(callee.kind()));
  }
}

Value Interpreter::CallFilter(std::string_view name, const Value& value, const Args& args) {
  const Native filter = FindFilter(name);
  if (filter == nullptr) {
    budget_.Fail("{} filter \"{}\"", IsUnsupportedFilter(name) ? "not supported: the" : "no",
                 Printable(name, 60));
  }
  DepthGuard guard(budget_);
  budget_.Charge(1);
  return filter(*this, value, args);
}

bool Interpreter::CallTest(std::string_view name, const Value& value, const Args& args) {
  const Test test = FindTest(name);
  if (test == nullptr) budget_.Fail("no test \"{}\"", Printable(name, 60));
  budget_.Charge(1);
  return test(*this, value, args);
}

Value Interpreter::MakeFunction(std::string_view name, Native native, const Value& self) {
  return Value(Kind::kFunction,
               std::make_shared<Function>(budget_, std::string(name), native, self));
}

// What Python's getattr finds; nothing if it raises AttributeError.
std::optional<Value> Interpreter::FindAttribute(const Value& object, std::string_view name) {
  const Kind kind = object.kind();
  const auto unsafe = [&] {
    return MakeUndefined(budget_, fmt::format("access to attribute '{}' of {} is unsafe",
                                              Printable(name, 60), KindName(kind)));
  };
  if (kind == Kind::kNamespace) {
    const Value* value = object.As<Namespace>().attributes.Find(name);
    return value == nullptr ? std::nullopt : std::optional<Value>(*value);
  }
  if (kind == Kind::kLoop) {
    if (std::optional<Value> value = object.As<Loop>().Attribute(name)) return value;
  }
  if (kind == Kind::kMacro && name == "name") {
    return MakeString(budget_, object.As<Macro>().name());
  }
  if (const Native native = FindMethod(kind, name); native != nullptr) {
    return MakeFunction(name, native, object);
  }
  if (IsUnsafeMethod(kind, name)) return unsafe();
  if (IsUnsupportedMethod(kind, name)) {
    budget_.Fail("\"{}\" of {} is not supported", Printable(name, 60), KindName(kind));
  }
  // Every Python object has some of these.
  if (name == "__class__" || name == "__doc__" || name == "__init__" || name == "__str__" ||
      name == "__repr__" || name == "__eq__" || name == "__hash__" || name == "__dir__") {
    return unsafe();
  }
  return std::nullopt;
}

Value Interpreter::GetAttribute(const Value& object, std::string_view name) {
  if (std::optional<Value> value = FindAttribute(object, name)) return *value;
  if (object.is_undefined()) FailUndefined(budget_, object);
  if (object.is(Kind::kDict)) {
    if (const Value* value = object.As<Dict>().Find(name); value != nullptr) return *value;
  }
  return MakeUndefined(budget_, fmt::format("{} has no attribute '{}'", KindName(object.kind()),
                                            Printable(name, 60)));
}

Value Interpreter::GetItem(const Value& object, const Value& key) {
  switch (object.kind()) {
    case Kind::kUndefined:
      FailUndefined(budget_, object);
    case Kind::kDict:
      if (!IsHashable(key)) break;
      if (const Value* value = object.As<Dict>().Find(key); value != nullptr) return *value;
      break;
    case Kind::kString:
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kRange:
      if (!key.is_integer()) break;
      if (std::optional<Value> value = Element(budget_, object, key.integer())) return *value;
      break;
    default:
      break;
  }
  if (!key.is_string()) {
    return MakeUndefined(budget_, fmt::format("{} has no such element", KindName(object.kind())));
  }
  if (std::optional<Value> value = FindAttribute(object, key.text())) return *value;
  return MakeUndefined(budget_, fmt::format("{} has no attribute '{}'", KindName(object.kind()),
                                            Printable(key.text(), 60)));
}

}  // namespace detour::data::jinja
