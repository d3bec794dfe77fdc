// What the parser makes of a template.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace detour::data::jinja {

enum class Op : uint8_t {
  kConst,    ///< constant number `id`
  kName,     ///< variable number `id`
  kTuple,    ///< children
  kList,     ///< children
  kDict,     ///< children: key, value, key, value, …
  kAttr,     ///< children[0].text
  kItem,     ///< children[0][children[1]]
  kSlice,    ///< children[0][children[1]:children[2]:children[3]], absent ones null
  kCall,     ///< children[0](args)
  kFilter,   ///< children[0]|text(args); in a filter block children[0] is null
  kTest,     ///< children[0] is text(args)
  kNot,      ///< not children[0]
  kNeg,      ///< -children[0]
  kPos,      ///< +children[0]
  kAnd,      ///< children[0] and children[1]
  kOr,       ///< children[0] or children[1]
  kCond,     ///< children[1] if children[0] else children[2]; the last may be null
  kCompare,  ///< children[0] operators[0] children[1] operators[1] …
  kBinary,   ///< children[0] text children[1]
  kConcat,   ///< children, as text
};

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

struct CallArgs {
  std::vector<ExprPtr> positional;
  std::vector<std::pair<std::string, ExprPtr>> keywords;
  ExprPtr star, star_star;
};

struct Expr {
  Op op;
  int line;
  int depth = 1;  ///< levels of nodes below and here; bounded
  int id = -1;
  std::string text;
  std::vector<ExprPtr> children;
  std::unique_ptr<CallArgs> args;
  std::vector<std::string> operators;  ///< "==", …, "in", "not in"
};

/// What is assigned to: a name, an attribute of a namespace, or a tuple of targets.
struct Target {
  int line = 0;
  int id = -1;            ///< the name's; -1: a tuple
  std::string attribute;  ///< not empty: of the namespace `id`
  std::vector<Target> parts;
};

struct Stmt;
using StmtPtr = std::unique_ptr<Stmt>;
using Body = std::vector<StmtPtr>;

enum class StmtKind : uint8_t {
  kText,        ///< text
  kPrint,       ///< exprs
  kIf,          ///< branches; one without condition is the else
  kFor,         ///< targets[0] in exprs[0] if exprs[1] (may be null): body, else branches[0]
  kSet,         ///< targets[0] = exprs[0]
  kSetBlock,    ///< targets[0] = body through the filter exprs[0] (may be null)
  kMacro,       ///< macro
  kCall,        ///< the call exprs[0] with `macro` as caller
  kFilter,      ///< body through the filter exprs[0]
  kWith,        ///< targets = exprs: body
  kGeneration,  ///< body in a scope of its own
  kBreak,
  kContinue,
};

struct Branch {
  ExprPtr condition;
  Body body;
  std::vector<int> missing;  ///< of the else of a for statement: as that of Stmt
};

struct MacroDef {
  std::string name;
  int id = -1;
  std::vector<std::pair<std::string, int>> parameters;
  std::vector<ExprPtr> defaults;  ///< of the last parameters
  bool uses_varargs = false, uses_kwargs = false, uses_caller = false;
  Body body;
  std::vector<int> missing;
};

struct Stmt {
  StmtKind kind;
  int line;
  std::string text;
  std::vector<ExprPtr> exprs;
  std::vector<Target> targets;
  std::vector<Branch> branches;
  std::unique_ptr<MacroDef> macro;
  Body body;
  std::vector<int> missing;  ///< names undefined where the body's scope begins
};

/// None, bool, int, float or string.
using Constant = std::variant<std::monostate, bool, int64_t, double, std::string>;

struct Program {
  std::string name;
  std::vector<std::string> variables;  ///< by number
  std::vector<Constant> constants;
  Body body;
  std::vector<int> missing;
};

}  // namespace detour::data::jinja
