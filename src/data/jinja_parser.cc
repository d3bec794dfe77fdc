#include "data/jinja_parser.h"

#include <algorithm>
#include <iterator>

#include "core/json.h"
#include "data/jinja_expr_parser.h"
#include "data/jinja_scopes.h"

namespace detour::data::jinja {
namespace {

constexpr std::string_view kUnsupportedTags[] = {"block",      "extends", "include", "import",
                                                 "from",       "do",      "trans",   "pluralize",
                                                 "autoescape", "debug"};

class Parser : private ExprParser {
 public:
  Parser(std::string_view source, const std::string& name) : ExprParser(source, name) {
    program_.name = name;
  }

  Program Run() {
    program_.body = ParseBody({});
    ResolveScopes(&program_);
    return std::move(program_);
  }

 private:
  StmtPtr Statement(StmtKind kind, int line) {
    auto statement = std::make_unique<Stmt>();
    statement->kind = kind;
    statement->line = line;
    return statement;
  }

  // Up to the tag of one of these names, which becomes the current token; without names up to the
  // end of the template.
  Body ParseBody(const std::vector<std::string_view>& ends) {
    Nesting nesting(this);
    Body body;
    while (!Is(TokenType::kEnd)) {
      const int line = Current().line;
      if (Is(TokenType::kData)) {
        body.push_back(Statement(StmtKind::kText, line));
        body.back()->text = std::move(Next().text);
      } else if (Is(TokenType::kVariableBegin)) {
        Next();
        body.push_back(Statement(StmtKind::kPrint, line));
        body.back()->exprs.push_back(ParseTuple(true, false));
        Expect(TokenType::kVariableEnd, "\"}}\"");
      } else {
        Expect(TokenType::kBlockBegin, "a tag");
        if (!Is(TokenType::kName)) FailHere("expected a tag's name, got {}", Describe());
        if (std::find(ends.begin(), ends.end(), Current().text) != ends.end()) return body;
        body.push_back(ParseStatement());
        Expect(TokenType::kBlockEnd, "\"%}\"");
      }
    }
    if (!ends.empty()) FailHere("the template ends where \"{}\" is expected", ends.back());
    return body;
  }

  // A tag's body: from "%}" to the tag of one of these names.
  Body ParseBlock(const std::vector<std::string_view>& ends) {
    SkipOperator(":");
    Expect(TokenType::kBlockEnd, "\"%}\"");
    return ParseBody(ends);
  }
  // The same up to the one tag `end`, whose name is taken.
  Body ParseWhole(std::string_view end) {
    Body body = ParseBlock({end});
    Next();
    return body;
  }

  StmtPtr ParseStatement() {
    const int line = Current().line;
    const std::string tag = Next().text;
    if (tag == "if") return ParseIf(line);
    if (tag == "for") return ParseFor(line);
    if (tag == "set") return ParseSet(line);
    if (tag == "macro") return ParseMacro(line);
    if (tag == "call") return ParseCallBlock(line);
    if (tag == "with") return ParseWith(line);
    if (tag == "filter") {
      StmtPtr statement = Statement(StmtKind::kFilter, line);
      statement->exprs.push_back(ParseFilter(nullptr, true));
      statement->body = ParseWhole("endfilter");
      return statement;
    }
    if (tag == "generation") {
      StmtPtr statement = Statement(StmtKind::kGeneration, line);
      const int loops = std::exchange(loops_, 0);
      statement->body = ParseWhole("endgeneration");
      loops_ = loops;
      return statement;
    }
    if (tag == "print") {
      StmtPtr statement = Statement(StmtKind::kPrint, line);
      while (!Is(TokenType::kBlockEnd)) {
        if (!statement->exprs.empty()) ExpectOperator(",");
        statement->exprs.push_back(ParseExpression());
      }
      return statement;
    }
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) FailAt(name_, line, "\"{}\" outside of a loop", tag);
      return Statement(tag == "break" ? StmtKind::kBreak : StmtKind::kContinue, line);
    }
    if (std::find(std::begin(kUnsupportedTags), std::end(kUnsupportedTags), tag) !=
        std::end(kUnsupportedTags)) {
      FailAt(name_, line, "the tag \"{}\" is not supported", tag);
    }
    FailAt(name_, line, "unknown tag \"{}\"", Printable(tag, 40));
  }

  StmtPtr ParseIf(int line) {
    StmtPtr statement = Statement(StmtKind::kIf, line);
    while (true) {
      Branch& branch = statement->branches.emplace_back();
      branch.condition = ParseTuple(false, false);
      branch.body = ParseBlock({"elif", "else", "endif"});
      const std::string tag = Next().text;
      if (tag == "elif") continue;
      if (tag == "else") {
        Branch& last = statement->branches.emplace_back();
        last.body = ParseWhole("endif");
      }
      return statement;
    }
  }

  StmtPtr ParseFor(int line) {
    StmtPtr statement = Statement(StmtKind::kFor, line);
    statement->targets.push_back(ParseTarget(false, true));
    if (!SkipName("in")) FailHere("expected \"in\", got {}", Describe());
    statement->exprs.push_back(ParseTuple(false, false, "recursive"));
    statement->exprs.push_back(SkipName("if") ? ParseExpression() : nullptr);
    if (IsName("recursive")) FailHere("recursive loops are not supported");
    ++loops_;
    statement->body = ParseBlock({"endfor", "else"});
    --loops_;
    if (Next().text == "else") {
      Branch& branch = statement->branches.emplace_back();
      branch.body = ParseWhole("endfor");
    }
    return statement;
  }

  StmtPtr ParseSet(int line) {
    StmtPtr statement = Statement(StmtKind::kSet, line);
    statement->targets.push_back(ParseTarget(true, false));
    if (SkipOperator("=")) {
      statement->exprs.push_back(ParseTuple(true, false));
      return statement;
    }
    statement->kind = StmtKind::kSetBlock;
    statement->exprs.push_back(IsOperator("|") ? ParseFilter(nullptr, false) : nullptr);
    statement->body = ParseWhole("endset");
    return statement;
  }

  StmtPtr ParseWith(int line) {
    StmtPtr statement = Statement(StmtKind::kWith, line);
    while (!Is(TokenType::kBlockEnd)) {
      if (!statement->targets.empty()) ExpectOperator(",");
      statement->targets.push_back(ParseTarget(false, false));
      ExpectOperator("=");
      statement->exprs.push_back(ParseExpression());
    }
    statement->body = ParseWhole("endwith");
    return statement;
  }

  StmtPtr ParseMacro(int line) {
    StmtPtr statement = Statement(StmtKind::kMacro, line);
    statement->macro = std::make_unique<MacroDef>();
    statement->macro->name = ExpectVariable();
    statement->macro->id = VariableId(statement->macro->name);
    ParseSignature(statement->macro.get());
    ParseMacroBody(statement->macro.get(), "endmacro");
    return statement;
  }

  StmtPtr ParseCallBlock(int line) {
    StmtPtr statement = Statement(StmtKind::kCall, line);
    statement->macro = std::make_unique<MacroDef>();
    if (IsOperator("(")) ParseSignature(statement->macro.get());
    statement->exprs.push_back(ParseExpression());
    if (statement->exprs[0]->op != Op::kCall) FailAt(name_, line, "expected a call");
    ParseMacroBody(statement->macro.get(), "endcall");
    return statement;
  }

  void ParseSignature(MacroDef* macro) {
    ExpectOperator("(");
    while (!IsOperator(")")) {
      if (!macro->parameters.empty()) ExpectOperator(",");
      const std::string name = ExpectVariable();
      for (const auto& [other, id] : macro->parameters) {
        if (other == name) FailHere("the parameter \"{}\" occurs twice", Printable(name, 40));
      }
      if (SkipOperator("=")) {
        macro->defaults.push_back(ParseExpression());
      } else if (!macro->defaults.empty()) {
        FailHere("a parameter without default follows one with default");
      }
      macro->parameters.emplace_back(name, VariableId(name));
    }
    ExpectOperator(")");
  }

  void ParseMacroBody(MacroDef* macro, std::string_view end) {
    const int loops = std::exchange(loops_, 0);
    macros_.push_back(macro);
    macro->body = ParseWhole(end);
    macros_.pop_back();
    loops_ = loops;
    for (const auto& [name, id] : macro->parameters) {
      if (name == "varargs") macro->uses_varargs = false;
      if (name == "kwargs") macro->uses_kwargs = false;
      if (name == "caller") macro->uses_caller = false;
    }
  }

  // A name that may be assigned to.
  std::string ExpectVariable() {
    std::string name = ExpectName();
    static constexpr std::string_view kConstants[] = {"true", "false", "none",
                                                      "True", "False", "None"};
    if (std::find(std::begin(kConstants), std::end(kConstants), name) != std::end(kConstants)) {
      FailHere("\"{}\" cannot be assigned to", name);
    }
    return name;
  }

  Target ParseTarget(bool may_be_attribute, bool in_for) {
    Target tuple;
    tuple.line = Current().line;
    bool is_tuple = false;
    while (true) {
      if (!tuple.parts.empty()) ExpectOperator(",");
      if (Is(TokenType::kBlockEnd) || Is(TokenType::kVariableEnd) || IsOperator(")") ||
          (in_for && IsName("in"))) {
        break;
      }
      tuple.parts.push_back(ParseSimpleTarget(may_be_attribute));
      if (!IsOperator(",")) break;
      is_tuple = true;
    }
    if (is_tuple) return tuple;
    if (tuple.parts.empty()) FailHere("expected a name, got {}", Describe());
    return std::move(tuple.parts[0]);
  }

  Target ParseSimpleTarget(bool may_be_attribute) {
    Nesting nesting(this);
    if (SkipOperator("(")) {
      if (IsOperator(")")) FailHere("an empty tuple as target is not supported");
      Target target = ParseTarget(false, false);
      ExpectOperator(")");
      return target;
    }
    Target target;
    target.line = Current().line;
    target.id = VariableId(ExpectVariable());
    if (may_be_attribute && SkipOperator(".")) target.attribute = ExpectName();
    return target;
  }

  int loops_ = 0;  // around the current place
};

}  // namespace

Program Parse(std::string_view source, const std::string& name) {
  return Parser(source, name).Run();
}

}  // namespace detour::data::jinja
