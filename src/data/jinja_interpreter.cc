#include "data/jinja_interpreter.h"

#include <algorithm>
#include <unordered_set>

#include "data/jinja_parser.h"
#include "data/utf8.h"

namespace detour::data::jinja {

// A block's own variables, for as long as the guard lives.
class ScopeGuard {
 public:
  ScopeGuard(Interpreter& interpreter, std::shared_ptr<Scope> parent,
             const std::vector<int>& missing)
      : interpreter_(interpreter), outer_(interpreter.scope_) {
    interpreter.budget_.Charge(1 + missing.size());
    auto scope = std::make_shared<Scope>();
    scope->parent = std::move(parent);
    for (const int id : missing) scope->variables.emplace_back(id, Value());
    interpreter.scope_ = std::move(scope);
  }
  ~ScopeGuard() { interpreter_.scope_ = std::move(outer_); }
  ScopeGuard(const ScopeGuard&) = delete;

 private:
  Interpreter& interpreter_;
  std::shared_ptr<Scope> outer_;
};

Loop::Loop(Budget& budget, Value iterable, std::unique_ptr<Iterator> iterator)
    : Object(budget, sizeof(Loop) + 64),
      iterable_(std::move(iterable)),
      iterator_(std::move(iterator)) {
  if (!iterable_.is(Kind::kGenerator)) length_ = jinja::Length(iterable_);
}

bool Loop::PeekNext() {
  if (after_) return true;
  Value value;
  if (ended_ || !iterator_->Next(&value)) {
    ended_ = true;
    return false;
  }
  after_ = std::move(value);
  return true;
}

bool Loop::Next(Value* out) {
  if (!PeekNext()) return false;
  *out = std::move(*after_);
  after_.reset();
  ++index0_;
  before_ = std::exchange(current_, *out);
  return true;
}

int64_t Loop::Length() {
  if (length_) return *length_;
  // What is left becomes a list, so that the loop can go on.
  std::vector<Value> rest;
  Value value;
  while (iterator_->Next(&value)) rest.push_back(std::move(value));
  length_ = static_cast<int64_t>(rest.size()) + index0_ + 1 + (after_ ? 1 : 0);
  iterator_ = Iterate(*budget, MakeList(*budget, std::move(rest)));
  ended_ = false;
  return *length_;
}

std::optional<Value> Loop::Attribute(std::string_view name) {
  if (name == "index") return Value::Int(index0_ + 1);
  if (name == "index0") return Value::Int(index0_);
  if (name == "first") return Value::Bool(index0_ == 0);
  if (name == "last") return Value::Bool(!PeekNext());
  if (name == "length") return Value::Int(Length());
  if (name == "revindex") return Value::Int(Length() - index0_);
  if (name == "revindex0") return Value::Int(Length() - index0_ - 1);
  if (name == "depth") return Value::Int(1);
  if (name == "depth0") return Value::Int(0);
  if (name == "previtem") {
    return index0_ == 0 ? MakeUndefined(*budget, "there is no previous item") : before_;
  }
  if (name == "nextitem") {
    return PeekNext() ? *after_ : MakeUndefined(*budget, "there is no next item");
  }
  return std::nullopt;
}

bool Loop::Changed(Value arguments) {
  if (changed_ && Equal(*budget, *changed_, arguments)) return false;
  changed_ = std::move(arguments);
  return true;
}

Interpreter::Interpreter(const Program& program, const RenderOptions& options)
    : program_(program), options_(options), budget_(options.limits, program.name) {
  for (const Constant& constant : program.constants) {
    if (const auto* boolean = std::get_if<bool>(&constant)) {
      constants_.push_back(Value::Bool(*boolean));
    } else if (const auto* integer = std::get_if<int64_t>(&constant)) {
      constants_.push_back(Value::Int(*integer));
    } else if (const auto* number = std::get_if<double>(&constant)) {
      constants_.push_back(Value::Float(*number));
    } else if (const auto* text = std::get_if<std::string>(&constant)) {
      constants_.push_back(MakeString(budget_, *text));
    } else {
      constants_.push_back(Value::None());
    }
  }
}

Interpreter::~Interpreter() {
  // Values point to owned objects without owning them, and no destructor looks at one.
  scope_.reset();
  owned_.clear();
}

std::string Interpreter::Run(const Json& variables) {
  scope_ = std::make_shared<Scope>();
  const std::unordered_set<int> missing(program_.missing.begin(), program_.missing.end());
  for (size_t id = 0; id < program_.variables.size(); ++id) {
    const std::string& name = program_.variables[id];
    if (name == "loop") loop_id_ = static_cast<int>(id);
    if (missing.contains(static_cast<int>(id))) continue;
    if (const auto it = variables.find(name); it != variables.end()) {
      scope_->variables.emplace_back(id, FromJson(budget_, *it));
    } else if (const Native native = FindGlobal(name); native != nullptr) {
      scope_->variables.emplace_back(id, MakeFunction(name, native, Value()));
    }
  }
  return Capture([&] { Execute(program_.body); });
}

Value Interpreter::Own(Kind kind, std::unique_ptr<Object> object) {
  owned_.push_back(std::move(object));
  // No control block: the pointer counts nothing.
  return Value(kind, std::shared_ptr<Object>(std::shared_ptr<Object>(), owned_.back().get()));
}

void Interpreter::Put(std::string_view text) {
  budget_.ChargeBytes(text.size());
  output_bytes_ += static_cast<int64_t>(text.size());
  if (output_bytes_ > options_.limits.max_output_bytes) {
    budget_.Fail("more than {} bytes of output", options_.limits.max_output_bytes);
  }
  *out_ += text;
}

// What `body` puts out.
template <typename Body>
std::string Interpreter::Capture(Body body) {
  std::string text;
  std::string* const outer = std::exchange(out_, &text);
  try {
    body();
  } catch (...) {
    out_ = outer;
    throw;
  }
  out_ = outer;
  output_bytes_ -= static_cast<int64_t>(text.size());
  return text;
}

void Interpreter::SetVariable(int id, Value value) {
  for (auto& [other, old] : scope_->variables) {
    if (other != id) continue;
    old = std::move(value);
    return;
  }
  budget_.Charge(1 + scope_->variables.size() / 8);
  scope_->variables.emplace_back(id, std::move(value));
}

Value Interpreter::GetVariable(int id) {
  for (const Scope* scope = scope_.get(); scope != nullptr; scope = scope->parent.get()) {
    budget_.Charge(1 + scope->variables.size() / 16);
    for (const auto& [other, value] : scope->variables) {
      if (other != id) continue;
      // One that its block has not set yet.
      if (value.is_undefined() && value.object() == nullptr) return UndefinedName(id);
      return value;
    }
  }
  return UndefinedName(id);
}

Value Interpreter::UndefinedName(int id) {
  return MakeUndefined(budget_,
                       fmt::format("'{}' is undefined", Printable(program_.variables[id], 60)));
}

void Interpreter::Assign(const Target& target, const Value& value) {
  budget_.line = target.line;
  budget_.Charge(1);
  if (!target.attribute.empty()) {
    const Value object = GetVariable(target.id);
    if (!object.is(Kind::kNamespace)) budget_.Fail("only a namespace has attributes to set");
    if (target.attribute[0] == '_') {
      budget_.Fail("a namespace cannot store the name \"{}\"", Printable(target.attribute, 60));
    }
    object.As<Namespace>().attributes.Set(MakeString(budget_, target.attribute), value);
    return;
  }
  if (target.id >= 0) {
    SetVariable(target.id, value);
    return;
  }
  const std::unique_ptr<Iterator> iterator = Iterate(budget_, value);
  std::vector<Value> items;
  Value item;
  while (items.size() <= target.parts.size() && iterator->Next(&item)) items.push_back(item);
  if (items.size() != target.parts.size()) {
    budget_.Fail("expected {} values to take apart, got {}", target.parts.size(),
                 items.size() > target.parts.size() ? "more" : fmt::format("{}", items.size()));
  }
  for (size_t i = 0; i < items.size(); ++i) Assign(target.parts[i], items[i]);
}

Interpreter::Flow Interpreter::Execute(const Body& body) {
  for (const StmtPtr& statement : body) {
    const Flow flow = Execute(*statement);
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

Interpreter::Flow Interpreter::Execute(const Stmt& statement) {
  DepthGuard guard(budget_);
  budget_.line = statement.line;
  budget_.Charge(1);
  switch (statement.kind) {
    case StmtKind::kText:
      Put(statement.text);
      return Flow::kNext;
    case StmtKind::kPrint:
      for (const ExprPtr& expr : statement.exprs) {
        const Value value = Eval(*expr);
        if (value.is_string()) {
          Put(value.text());
        } else {
          Put(ToString(budget_, value));
        }
      }
      return Flow::kNext;
    case StmtKind::kIf:
      return ExecuteIf(statement);
    case StmtKind::kFor:
      return ExecuteFor(statement);
    case StmtKind::kSet:
      Assign(statement.targets[0], Eval(*statement.exprs[0]));
      return Flow::kNext;
    case StmtKind::kWith:
      return ExecuteWith(statement);
    case StmtKind::kSetBlock:
    case StmtKind::kFilter:
    case StmtKind::kGeneration:
      return ExecuteCapture(statement);
    case StmtKind::kMacro:
      SetVariable(statement.macro->id,
                  Own(Kind::kMacro, std::make_unique<Macro>(budget_, *statement.macro, scope_)));
      return Flow::kNext;
    case StmtKind::kCall:
      ExecuteCall(statement);
      return Flow::kNext;
    case StmtKind::kBreak:
      return Flow::kBreak;
    case StmtKind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNext;
}

Interpreter::Flow Interpreter::ExecuteIf(const Stmt& statement) {
  for (const Branch& branch : statement.branches) {
    if (branch.condition == nullptr || Truthy(Eval(*branch.condition))) {
      return Execute(branch.body);
    }
  }
  return Flow::kNext;
}

namespace {

// The items of a for statement that fulfil its condition.
class FilterIterator : public Iterator {
 public:
  FilterIterator(Interpreter& interpreter, const Stmt& statement, std::shared_ptr<Scope> scope,
                 std::unique_ptr<Iterator> items)
      : interpreter_(interpreter),
        statement_(statement),
        scope_(std::move(scope)),
        items_(std::move(items)) {}
  bool Next(Value* out) override {
    while (items_->Next(out)) {
      ScopeGuard scope(interpreter_, scope_, {});
      interpreter_.Assign(statement_.targets[0], *out);
      if (Truthy(interpreter_.Eval(*statement_.exprs[1]))) return true;
    }
    return false;
  }

 private:
  Interpreter& interpreter_;
  const Stmt& statement_;
  std::shared_ptr<Scope> scope_;
  std::unique_ptr<Iterator> items_;
};

}  // namespace

Interpreter::Flow Interpreter::ExecuteFor(const Stmt& statement) {
  Value iterable = Eval(*statement.exprs[0]);
  budget_.line = statement.line;
  std::unique_ptr<Iterator> iterator = Iterate(budget_, iterable);
  if (statement.exprs[1] != nullptr) {
    auto filtered = std::make_unique<FilterIterator>(*this, statement, scope_, std::move(iterator));
    iterable = MakeGenerator(budget_, std::move(filtered), 0);
    iterator = Iterate(budget_, iterable);
  }
  const Value loop_value =
      Own(Kind::kLoop, std::make_unique<Loop>(budget_, iterable, std::move(iterator)));
  Loop& loop = loop_value.As<Loop>();
  const std::shared_ptr<Scope> outer = scope_;
  bool completed_one = false;  // as in jinja2: an iteration cut by break or continue does not count
  Value item;
  while (true) {
    budget_.line = statement.line;
    if (!loop.Next(&item)) break;
    ScopeGuard scope(*this, outer, statement.missing);
    if (loop_id_ >= 0) SetVariable(loop_id_, loop_value);
    Assign(statement.targets[0], item);
    const Flow flow = Execute(statement.body);
    if (flow == Flow::kBreak) break;
    completed_one |= flow == Flow::kNext;
  }
  if (!completed_one && !statement.branches.empty()) {
    ScopeGuard scope(*this, outer, statement.branches[0].missing);
    return Execute(statement.branches[0].body);
  }
  return Flow::kNext;
}

Interpreter::Flow Interpreter::ExecuteWith(const Stmt& statement) {
  std::vector<Value> values;
  for (const ExprPtr& expr : statement.exprs) values.push_back(Eval(*expr));
  ScopeGuard scope(*this, scope_, statement.missing);
  for (size_t i = 0; i < values.size(); ++i) Assign(statement.targets[i], values[i]);
  return Execute(statement.body);
}

Interpreter::Flow Interpreter::ExecuteCapture(const Stmt& statement) {
  Flow flow = Flow::kNext;
  std::string text = Capture([&] {
    ScopeGuard scope(*this, scope_, statement.missing);
    flow = Execute(statement.body);
  });
  if (statement.kind == StmtKind::kGeneration) {
    Put(text);
    return flow;
  }
  // A break or continue leaves before the text is used.
  if (flow != Flow::kNext) return flow;
  Value value = MakeString(budget_, std::move(text));
  if (!statement.exprs.empty() && statement.exprs[0] != nullptr) {
    value = EvalFilter(*statement.exprs[0], &value);
  }
  if (statement.kind == StmtKind::kSetBlock) {
    Assign(statement.targets[0], value);
  } else {
    Put(ToString(budget_, value));
  }
  return flow;
}

void Interpreter::ExecuteCall(const Stmt& statement) {
  const Expr& call = *statement.exprs[0];
  const Value caller =
      Own(Kind::kMacro, std::make_unique<Macro>(budget_, *statement.macro, scope_));
  const Value callee = Eval(*call.children[0]);
  Args args = EvalArgs(*call.args);
  for (const auto& [key, value] : args.keywords) {
    if (key == "caller") budget_.Fail("the argument \"caller\" occurs twice");
  }
  args.keywords.emplace_back("caller", caller);
  budget_.line = call.line;
  const Value result = Call(callee, args);
  Put(ToString(budget_, result));
}

Value Interpreter::CallMacro(const Macro& macro, const Args& args) {
  DepthGuard guard(budget_);
  const MacroDef& definition = macro.definition;
  const size_t count = definition.parameters.size();
  std::vector<bool> used(args.keywords.size(), false);
  const auto keyword = [&](std::string_view name) -> const Value* {
    for (size_t i = 0; i < args.keywords.size(); ++i) {
      if (args.keywords[i].first == name) {
        used[i] = true;
        return &args.keywords[i].second;
      }
    }
    return nullptr;
  };
  ScopeGuard scope(*this, macro.scope, definition.missing);
  const int line = budget_.line;
  std::vector<size_t> missing;
  bool found_caller = false;
  for (size_t i = 0; i < count; ++i) {
    const auto& [name, id] = definition.parameters[i];
    const Value* value = i < args.positional.size() ? &args.positional[i] : keyword(name);
    found_caller |= name == "caller";
    if (value == nullptr) missing.push_back(i);
    SetVariable(id, value != nullptr
                        ? *value
                        : MakeUndefined(budget_, fmt::format("parameter '{}' was not provided",
                                                             Printable(name, 60))));
  }
  const auto set_named = [&](const char* name, Value value) {
    const auto& names = program_.variables;
    const auto it = std::find(names.begin(), names.end(), name);
    if (it != names.end()) SetVariable(static_cast<int>(it - names.begin()), std::move(value));
  };
  if (definition.uses_caller && !found_caller) {
    const Value* value = keyword("caller");
    set_named("caller", value != nullptr && !value->is(Kind::kNone)
                            ? *value
                            : MakeUndefined(budget_, "No caller defined"));
  }
  auto rest = std::make_shared<Dict>(budget_);
  for (size_t i = 0; i < args.keywords.size(); ++i) {
    if (used[i]) continue;
    if (!definition.uses_kwargs) {
      budget_.Fail("the macro {} takes no argument \"{}\"", Printable(definition.name, 60),
                   Printable(args.keywords[i].first, 60));
    }
    rest->Set(MakeString(budget_, args.keywords[i].first), args.keywords[i].second);
  }
  if (definition.uses_kwargs) set_named("kwargs", Value(Kind::kDict, std::move(rest)));
  if (definition.uses_varargs) {
    const size_t first = std::min(count, args.positional.size());
    set_named("varargs",
              MakeTuple(budget_, {args.positional.begin() + first, args.positional.end()}));
  } else if (args.positional.size() > count) {
    budget_.Fail("the macro {} takes not more than {} arguments", Printable(definition.name, 60),
                 count);
  }
  const size_t num_required = count - definition.defaults.size();
  for (const size_t i : missing) {
    if (i < num_required) continue;
    SetVariable(definition.parameters[i].second, Eval(*definition.defaults[i - num_required]));
  }
  std::string text = Capture([&] { Execute(definition.body); });
  budget_.line = line;
  return MakeString(budget_, std::move(text));
}

namespace {

// One line end for all, and none at the end: as jinja2 reads a template.
std::string Normalize(std::string_view source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] != '\r') {
      out += source[i];
      continue;
    }
    out += '\n';
    if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

}  // namespace

Template::Template(std::string_view source, std::string name) {
  constexpr size_t kMaxBytes = size_t{1} << 20;
  if (source.substr(0, 3) == "\xEF\xBB\xBF") source.remove_prefix(3);
  if (source.size() > kMaxBytes) Fail("data.jinja", "{}: more than {} bytes", name, kMaxBytes);
  if (const size_t valid = ValidUtf8Prefix(source); valid != source.size()) {
    Fail("data.jinja", "{}: byte {} is not UTF-8", name, valid);
  }
  program_ = std::make_shared<const Program>(Parse(Normalize(source), name));
}

std::string Template::Render(const Json& variables, const RenderOptions& options) const {
  if (!variables.is_object()) Fail("data.jinja", "{}: the variables are no object", program_->name);
  return Interpreter(*program_, options).Run(variables);
}

}  // namespace detour::data::jinja
