// Runs a Program. One object per rendering.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/jinja_ast.h"
#include "data/jinja_value.h"

namespace detour::data::jinja {

/// Variables of one block; what it does not have is the parent's.
struct Scope {
  std::shared_ptr<Scope> parent;
  std::vector<std::pair<int, Value>> variables;
};

/// The variable `loop`, and what the for statement walks with.
class Loop : public Object {
 public:
  Loop(Budget& budget, Value iterable, std::unique_ptr<Iterator> iterator);

  bool Next(Value* out);
  int64_t index0() const { return index0_; }
  /// Takes what is left of a generator.
  int64_t Length();
  /// An attribute that is no method; nothing if there is none of this name.
  std::optional<Value> Attribute(std::string_view name);
  bool Changed(Value arguments);

 private:
  bool PeekNext();

  Value iterable_;
  std::unique_ptr<Iterator> iterator_;
  int64_t index0_ = -1;
  std::optional<int64_t> length_;
  std::optional<Value> after_, changed_;
  bool ended_ = false;
  Value before_, current_;
};

class Macro : public Object {
 public:
  Macro(Budget& budget, const MacroDef& definition, std::shared_ptr<Scope> scope)
      : Object(budget, sizeof(Macro)), definition(definition), scope(std::move(scope)) {}
  const std::string& name() const { return definition.name; }

  const MacroDef& definition;
  std::shared_ptr<Scope> scope;
};

/// Values of the parameters called `names`, null where not given. A keyword may name a parameter
/// whose name does not begin with "/". Fails if one of the first `num_required` is missing, or for
/// an argument that has no parameter. `what` is called so in messages.
std::vector<const Value*> Bind(Budget& budget, std::string_view what, const Args& args,
                               std::initializer_list<std::string_view> names, int num_required = 0);
/// An argument that must be an integer, a string, a boolean.
int64_t IntegerArg(Budget& budget, const Value* value, int64_t fallback);
bool BoolArg(const Value* value, bool fallback);

class Interpreter {
 public:
  Interpreter(const Program& program, const RenderOptions& options);
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;

  std::string Run(const Json& variables);

  Budget& budget() { return budget_; }
  const RenderOptions& options() const { return options_; }

  Value Eval(const Expr& expr);
  Value Call(const Value& callee, const Args& args);
  Value CallFilter(std::string_view name, const Value& value, const Args& args);
  bool CallTest(std::string_view name, const Value& value, const Args& args);
  /// object.name and object[key], as the sandbox does them.
  Value GetAttribute(const Value& object, std::string_view name);
  Value GetItem(const Value& object, const Value& key);
  /// Something that may be part of a cycle: freed with the interpreter.
  Value Own(Kind kind, std::unique_ptr<Object> object);
  /// A method bound to its object, or one of the functions that templates call.
  Value MakeFunction(std::string_view name, Native native, const Value& self);

  void Assign(const Target& target, const Value& value);

 private:
  friend class ScopeGuard;
  enum class Flow { kNext, kBreak, kContinue };

  // Statements: jinja_interpreter.cc.
  Flow Execute(const Body& body);
  Flow Execute(const Stmt& statement);
  Flow ExecuteIf(const Stmt& statement);
  Flow ExecuteFor(const Stmt& statement);
  Flow ExecuteWith(const Stmt& statement);
  Flow ExecuteCapture(const Stmt& statement);
  void ExecuteCall(const Stmt& statement);
  Value CallMacro(const Macro& macro, const Args& args);
  void Put(std::string_view text);
  template <typename Body>
  std::string Capture(Body body);
  void SetVariable(int id, Value value);
  Value GetVariable(int id);
  Value UndefinedName(int id);

  // Expressions: jinja_expr.cc.
  Value EvalSequence(const Expr& expr);
  Value EvalDict(const Expr& expr);
  Value EvalSlice(const Expr& expr);
  Value EvalCall(const Expr& expr);
  Value EvalCompare(const Expr& expr);
  Value EvalConcat(const Expr& expr);
  Value EvalCondition(const Expr& expr);
  Value EvalFilter(const Expr& expr, const Value* block);
  bool Compare(std::string_view op, const Value& a, const Value& b);
  Args EvalArgs(const CallArgs& args);
  std::optional<Value> FindAttribute(const Value& object, std::string_view name);

  const Program& program_;
  const RenderOptions& options_;
  Budget budget_;
  std::vector<std::unique_ptr<Object>> owned_;
  std::vector<Value> constants_;
  std::shared_ptr<Scope> scope_;
  int loop_id_ = -1;  // of the variable `loop`, if the template names it
  std::string* out_ = nullptr;
  int64_t output_bytes_ = 0;
};

/// The filter, test, method or function of this name, or null.
Native FindFilter(std::string_view name);
Native FindMethod(Kind kind, std::string_view name);
Native FindGlobal(std::string_view name);
using Test = bool (*)(Interpreter& interpreter, const Value& value, const Args& args);
Test FindTest(std::string_view name);
/// What jinja2 or Python has by this name and this interpreter has not.
bool IsUnsupportedFilter(std::string_view name);
bool IsUnsupportedMethod(Kind kind, std::string_view name);
/// A method that would change its object, which the sandbox hides.
bool IsUnsafeMethod(Kind kind, std::string_view name);

}  // namespace detour::data::jinja
