#include "data/jinja_expr_parser.h"

#include <iterator>

#include "core/json.h"

namespace detour::data::jinja {

std::string ExprParser::Describe() const {
  switch (Current().type) {
    case TokenType::kEnd:
      return "the end of the template";
    case TokenType::kData:
      return "text";
    case TokenType::kBlockEnd:
      return "\"%}\"";
    case TokenType::kVariableEnd:
      return "\"}}\"";
    case TokenType::kString:
      return "a string";
    case TokenType::kInteger:
    case TokenType::kFloat:
      return "a number";
    default:
      return fmt::format("\"{}\"", Printable(Current().text, 40));
  }
}

void ExprParser::Expect(TokenType type, const char* what) {
  if (!Is(type)) FailHere("expected {}, got {}", what, Describe());
  Next();
}

void ExprParser::ExpectOperator(std::string_view text) {
  if (!SkipOperator(text)) FailHere("expected \"{}\", got {}", text, Describe());
}

std::string ExprParser::ExpectName() {
  if (!Is(TokenType::kName)) FailHere("expected a name, got {}", Describe());
  return Next().text;
}

ExprPtr ExprParser::Finish(ExprPtr node) {
  const auto count = [&](const ExprPtr& child) {
    if (child != nullptr) node->depth = std::max(node->depth, child->depth + 1);
  };
  for (const ExprPtr& child : node->children) count(child);
  if (node->args != nullptr) {
    for (const ExprPtr& child : node->args->positional) count(child);
    for (const auto& [key, child] : node->args->keywords) count(child);
    count(node->args->star);
    count(node->args->star_star);
  }
  if (node->depth > kMaxExprDepth) {
    FailHere("an expression nested deeper than {} levels", kMaxExprDepth);
  }
  return node;
}

ExprPtr ExprParser::Const(Constant constant, int line) {
  ExprPtr node = Node(Op::kConst, line);
  node->id = static_cast<int>(program_.constants.size());
  program_.constants.push_back(std::move(constant));
  return node;
}

int ExprParser::VariableId(const std::string& name) {
  const auto [it, added] = ids_.emplace(name, static_cast<int>(program_.variables.size()));
  if (added) program_.variables.push_back(name);
  return it->second;
}

ExprPtr ExprParser::ParseExpression(bool with_condition) {
  Nesting nesting(this);
  if (!with_condition) return ParseOr();
  int line = Current().line;
  ExprPtr value = ParseOr();
  while (SkipName("if")) {
    ExprPtr condition = ParseOr();
    ExprPtr otherwise = SkipName("else") ? ParseExpression() : nullptr;
    value = Node(Op::kCond, line, std::move(condition), std::move(value), std::move(otherwise));
    line = Current().line;
  }
  return value;
}

ExprPtr ExprParser::ParseTuple(bool with_condition, bool in_brackets, std::string_view end_name) {
  const int line = Current().line;
  std::vector<ExprPtr> parts;
  bool is_tuple = false;
  while (true) {
    if (!parts.empty()) ExpectOperator(",");
    if (Is(TokenType::kVariableEnd) || Is(TokenType::kBlockEnd) || IsOperator(")") ||
        (!end_name.empty() && IsName(end_name))) {
      break;
    }
    parts.push_back(ParseExpression(with_condition));
    if (!IsOperator(",")) break;
    is_tuple = true;
  }
  if (!is_tuple) {
    if (!parts.empty()) return std::move(parts[0]);
    if (!in_brackets) FailHere("expected an expression, got {}", Describe());
  }
  return Many(Op::kTuple, line, std::move(parts));
}

ExprPtr ExprParser::Many(Op op, int line, std::vector<ExprPtr> parts) {
  ExprPtr node = Node(op, line);
  node->children = std::move(parts);
  return Finish(std::move(node));
}

ExprPtr ExprParser::ParseOr() {
  const int line = Current().line;
  ExprPtr left = ParseAnd();
  while (SkipName("or")) left = Node(Op::kOr, line, std::move(left), ParseAnd());
  return left;
}

ExprPtr ExprParser::ParseAnd() {
  const int line = Current().line;
  ExprPtr left = ParseNot();
  while (SkipName("and")) left = Node(Op::kAnd, line, std::move(left), ParseNot());
  return left;
}

ExprPtr ExprParser::ParseNot() {
  const int line = Current().line;
  if (!SkipName("not")) return ParseCompare();
  Nesting nesting(this);
  return Node(Op::kNot, line, ParseNot());
}

ExprPtr ExprParser::ParseCompare() {
  const int line = Current().line;
  ExprPtr first = ParseSum();
  std::vector<std::string> operators;
  std::vector<ExprPtr> operands;
  while (true) {
    static constexpr std::string_view kOperators[] = {"==", "!=", "<", "<=", ">", ">="};
    if (Is(TokenType::kOperator) && std::find(std::begin(kOperators), std::end(kOperators),
                                              Current().text) != std::end(kOperators)) {
      operators.push_back(Next().text);
    } else if (SkipName("in")) {
      operators.emplace_back("in");
    } else if (IsName("not") && IsToken(Look(), TokenType::kName, "in")) {
      Next();
      Next();
      operators.emplace_back("not in");
    } else {
      break;
    }
    operands.push_back(ParseSum());
  }
  if (operators.empty()) return first;
  operands.insert(operands.begin(), std::move(first));
  ExprPtr node = Many(Op::kCompare, line, std::move(operands));
  node->operators = std::move(operators);
  return node;
}

ExprPtr ExprParser::Binary(std::string op, int line, ExprPtr left, ExprPtr right) {
  ExprPtr node = Node(Op::kBinary, line, std::move(left), std::move(right));
  node->text = std::move(op);
  return node;
}

ExprPtr ExprParser::ParseSum() {
  ExprPtr left = ParseConcat();
  while (IsOperator("+") || IsOperator("-")) {
    const Token& token = Next();
    left = Binary(token.text, token.line, std::move(left), ParseConcat());
  }
  return left;
}

ExprPtr ExprParser::ParseConcat() {
  const int line = Current().line;
  std::vector<ExprPtr> parts;
  do {
    parts.push_back(ParseProduct());
  } while (SkipOperator("~"));
  return parts.size() == 1 ? std::move(parts[0]) : Many(Op::kConcat, line, std::move(parts));
}

ExprPtr ExprParser::ParseProduct() {
  ExprPtr left = ParsePower();
  while (IsOperator("*") || IsOperator("/") || IsOperator("//") || IsOperator("%")) {
    const Token& token = Next();
    left = Binary(token.text, token.line, std::move(left), ParsePower());
  }
  return left;
}

ExprPtr ExprParser::ParsePower() {
  ExprPtr left = ParseUnary(true);
  while (IsOperator("**")) {
    const Token& token = Next();
    left = Binary(token.text, token.line, std::move(left), ParseUnary(true));
  }
  return left;
}

ExprPtr ExprParser::ParseUnary(bool with_filter) {
  Nesting nesting(this);
  const int line = Current().line;
  ExprPtr node;
  if (SkipOperator("-")) {
    node = Node(Op::kNeg, line, ParseUnary(false));
  } else if (SkipOperator("+")) {
    node = Node(Op::kPos, line, ParseUnary(false));
  } else {
    node = ParsePrimary();
  }
  node = ParsePostfix(std::move(node));
  while (with_filter) {
    if (IsOperator("|")) {
      node = ParseFilter(std::move(node), false);
    } else if (IsName("is")) {
      node = ParseTest(std::move(node));
    } else if (IsOperator("(")) {
      node = ParseCall(std::move(node));
    } else {
      break;
    }
  }
  return node;
}

ExprPtr ExprParser::ParsePrimary() {
  const Token& token = Current();
  const int line = token.line;
  switch (token.type) {
    case TokenType::kName:
      Next();
      return NameOrConstant(token.text, line);
    case TokenType::kString: {
      std::string text;
      while (Is(TokenType::kString)) text += Next().text;
      return Const(std::move(text), line);
    }
    case TokenType::kInteger:
      return Const(Next().integer, line);
    case TokenType::kFloat:
      return Const(Next().number, line);
    default:
      break;
  }
  if (SkipOperator("(")) {
    ExprPtr node = ParseTuple(true, true);
    ExpectOperator(")");
    return node;
  }
  const bool is_list = IsOperator("[");
  if (!is_list && !IsOperator("{")) FailHere("unexpected {}", Describe());
  Next();
  std::vector<ExprPtr> parts;
  const char* const end = is_list ? "]" : "}";
  while (!IsOperator(end)) {
    if (!parts.empty()) ExpectOperator(",");
    if (IsOperator(end)) break;
    parts.push_back(ParseExpression());
    if (is_list) continue;
    ExpectOperator(":");
    parts.push_back(ParseExpression());
  }
  Next();
  return Many(is_list ? Op::kList : Op::kDict, line, std::move(parts));
}

ExprPtr ExprParser::NameOrConstant(const std::string& name, int line) {
  if (name == "true" || name == "True") return Const(true, line);
  if (name == "false" || name == "False") return Const(false, line);
  if (name == "none" || name == "None") return Const(std::monostate(), line);
  for (MacroDef* macro : macros_) {
    macro->uses_varargs |= name == "varargs";
    macro->uses_kwargs |= name == "kwargs";
    macro->uses_caller |= name == "caller";
  }
  ExprPtr node = Node(Op::kName, line);
  node->id = VariableId(name);
  return node;
}

ExprPtr ExprParser::ParsePostfix(ExprPtr node) {
  while (true) {
    if (IsOperator(".") || IsOperator("[")) {
      node = ParseSubscript(std::move(node));
    } else if (IsOperator("(")) {
      node = ParseCall(std::move(node));
    } else {
      return node;
    }
  }
}

ExprPtr ExprParser::ParseSubscript(ExprPtr object) {
  const int line = Current().line;
  if (SkipOperator(".")) {
    if (Is(TokenType::kInteger)) {
      return Node(Op::kItem, line, std::move(object), Const(Next().integer, line));
    }
    std::string attribute = ExpectName();
    ExprPtr node = Node(Op::kAttr, line, std::move(object));
    node->text = std::move(attribute);
    return node;
  }
  ExpectOperator("[");
  std::vector<ExprPtr> parts;  // object, start, stop, step
  parts.push_back(std::move(object));
  bool is_slice = false;
  if (IsOperator("]")) {
    parts.push_back(Many(Op::kTuple, line, {}));
  } else {
    parts.push_back(IsOperator(":") ? nullptr : ParseExpression());
  }
  while (parts.size() < 4 && SkipOperator(":")) {
    is_slice = true;
    const bool absent = IsOperator(":") || IsOperator("]") || IsOperator(",");
    parts.push_back(absent ? nullptr : ParseExpression());
  }
  if (IsOperator(",")) {
    if (is_slice) FailHere("a slice in a tuple is not supported");
    std::vector<ExprPtr> indices;
    indices.push_back(std::move(parts[1]));
    while (SkipOperator(",")) indices.push_back(ParseExpression());
    parts[1] = Many(Op::kTuple, line, std::move(indices));
  }
  ExpectOperator("]");
  if (is_slice) parts.resize(4);
  return Many(is_slice ? Op::kSlice : Op::kItem, line, std::move(parts));
}

std::unique_ptr<CallArgs> ExprParser::ParseArgs() {
  auto args = std::make_unique<CallArgs>();
  ExpectOperator("(");
  bool first = true;
  const auto ensure = [&](bool condition) {
    if (!condition) FailHere("the order of a call's arguments");
  };
  while (!IsOperator(")")) {
    if (!first) ExpectOperator(",");
    if (!first && IsOperator(")")) break;
    first = false;
    if (SkipOperator("*")) {
      ensure(args->star == nullptr && args->star_star == nullptr);
      args->star = ParseExpression();
    } else if (SkipOperator("**")) {
      ensure(args->star_star == nullptr);
      args->star_star = ParseExpression();
    } else if (Is(TokenType::kName) && IsToken(Look(), TokenType::kOperator, "=")) {
      ensure(args->star_star == nullptr);
      std::string key = Next().text;
      Next();
      for (const auto& [other, value] : args->keywords) {
        if (other == key) FailHere("the argument \"{}\" occurs twice", Printable(key, 40));
      }
      args->keywords.emplace_back(std::move(key), ParseExpression());
    } else {
      ensure(args->star == nullptr && args->star_star == nullptr && args->keywords.empty());
      args->positional.push_back(ParseExpression());
    }
  }
  ExpectOperator(")");
  return args;
}

ExprPtr ExprParser::ParseCall(ExprPtr callee) {
  ExprPtr node = Node(Op::kCall, Current().line, std::move(callee));
  node->args = ParseArgs();
  return Finish(std::move(node));
}

std::string ExprParser::DottedName() {
  std::string name = ExpectName();
  while (SkipOperator(".")) name.append(".").append(ExpectName());
  return name;
}

ExprPtr ExprParser::ParseFilter(ExprPtr value, bool inside) {
  while (inside || SkipOperator("|")) {
    inside = false;
    const int line = Current().line;
    std::string name = DottedName();
    ExprPtr node = Node(Op::kFilter, line, std::move(value));
    node->text = std::move(name);
    node->args = IsOperator("(") ? ParseArgs() : std::make_unique<CallArgs>();
    value = Finish(std::move(node));
  }
  return value;
}

ExprPtr ExprParser::ParseTest(ExprPtr value) {
  const int line = Current().line;
  Next();
  const bool negated = SkipName("not");
  ExprPtr node = Node(Op::kTest, line, std::move(value));
  node->text = DottedName();
  node->args = std::make_unique<CallArgs>();
  const bool starts_value = Is(TokenType::kName) || Is(TokenType::kString) ||
                            Is(TokenType::kInteger) || Is(TokenType::kFloat) || IsOperator("[") ||
                            IsOperator("{");
  if (IsOperator("(")) {
    node->args = ParseArgs();
  } else if (starts_value && !IsName("else") && !IsName("or") && !IsName("and")) {
    if (IsName("is")) FailHere("two tests in a row");
    node->args->positional.push_back(ParsePostfix(ParsePrimary()));
  }
  node = Finish(std::move(node));
  return negated ? Node(Op::kNot, line, std::move(node)) : std::move(node);
}

}  // namespace detour::data::jinja
