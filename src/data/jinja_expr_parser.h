// The expressions of templates; what the parser of statements is built on.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "data/jinja_ast.h"
#include "data/jinja_lexer.h"

namespace detour::data::jinja {

class ExprParser {
 protected:
  ExprParser(std::string_view source, const std::string& name)
      : name_(name), tokens_(Tokenize(source, name)) {}

  class Nesting {
   public:
    explicit Nesting(ExprParser* parser) : parser_(parser) {
      if (++parser->nesting_ > kMaxNesting) {
        parser->FailHere("nested deeper than {} levels", kMaxNesting);
      }
    }
    ~Nesting() { --parser_->nesting_; }

   private:
    ExprParser* parser_;
  };

  static constexpr int kMaxNesting = 200;    // of brackets, unary operators and blocks
  static constexpr int kMaxExprDepth = 200;  // of expressions, chains of operators included

  // Tokens. Next returns the current one and moves on.
  const Token& Current() const { return tokens_[at_]; }
  const Token& Look() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  Token& Next() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }

  template <typename... Args>
  [[noreturn]] void FailHere(fmt::format_string<Args...> format, Args&&... args) const {
    FailAt(name_, Current().line, format, std::forward<Args>(args)...);
  }
  std::string Describe() const;

  bool Is(TokenType type) const { return Current().type == type; }
  static bool IsToken(const Token& token, TokenType type, std::string_view text) {
    return token.type == type && token.text == text;
  }
  bool IsName(std::string_view text) const { return IsToken(Current(), TokenType::kName, text); }
  bool IsOperator(std::string_view text) const {
    return IsToken(Current(), TokenType::kOperator, text);
  }
  bool SkipName(std::string_view text) { return IsName(text) && (Next(), true); }
  bool SkipOperator(std::string_view text) { return IsOperator(text) && (Next(), true); }
  void Expect(TokenType type, const char* what);
  void ExpectOperator(std::string_view text);
  std::string ExpectName();

  // Nodes.
  template <typename... Children>
  ExprPtr Node(Op op, int line, Children... children) {
    auto node = std::make_unique<Expr>();
    node->op = op;
    node->line = line;
    (node->children.push_back(std::move(children)), ...);
    return Finish(std::move(node));
  }
  // Sets the depth, which is bounded.
  ExprPtr Finish(ExprPtr node);
  ExprPtr Const(Constant constant, int line);
  ExprPtr Many(Op op, int line, std::vector<ExprPtr> parts);
  ExprPtr Binary(std::string op, int line, ExprPtr left, ExprPtr right);
  int VariableId(const std::string& name);

  // One function for each level of precedence.
  ExprPtr ParseExpression(bool with_condition = true);
  // One expression, or a tuple without brackets.
  ExprPtr ParseTuple(bool with_condition, bool in_brackets, std::string_view end_name = "");
  ExprPtr ParseOr();
  ExprPtr ParseAnd();
  ExprPtr ParseNot();
  ExprPtr ParseCompare();
  ExprPtr ParseSum();
  ExprPtr ParseConcat();
  ExprPtr ParseProduct();
  ExprPtr ParsePower();
  ExprPtr ParseUnary(bool with_filter);
  ExprPtr ParsePrimary();
  ExprPtr NameOrConstant(const std::string& name, int line);
  ExprPtr ParsePostfix(ExprPtr node);
  ExprPtr ParseSubscript(ExprPtr object);
  std::unique_ptr<CallArgs> ParseArgs();
  ExprPtr ParseCall(ExprPtr callee);
  std::string DottedName();
  // One or more filters; `inside`: the current token is the first one's name.
  ExprPtr ParseFilter(ExprPtr value, bool inside);
  ExprPtr ParseTest(ExprPtr value);

  const std::string& name_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  int nesting_ = 0;
  std::unordered_map<std::string, int> ids_;
  std::vector<MacroDef*> macros_;  // around the current place
  Program program_;
};

}  // namespace detour::data::jinja
