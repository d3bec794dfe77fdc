// Template text -> tokens, as jinja2's lexer with trim_blocks and lstrip_blocks.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"

namespace detour::data::jinja {

enum class TokenType : uint8_t {
  kData,
  kBlockBegin,
  kBlockEnd,
  kVariableBegin,
  kVariableEnd,
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd,
};

struct Token {
  TokenType type;
  int line;
  std::string text;  ///< data, name, operator; a string's value
  int64_t integer = 0;
  double number = 0;
};

/// Error("data.jinja"): "NAME: line N: what".
template <typename... Args>
[[noreturn]] void FailAt(const std::string& name, int line, fmt::format_string<Args...> format,
                         Args&&... args) {
  Fail("data.jinja", "{}: line {}: {}", name, line,
       fmt::format(format, std::forward<Args>(args)...));
}

/// `source` is UTF-8 whose line ends are all "\n". The last token is kEnd.
std::vector<Token> Tokenize(std::string_view source, const std::string& name);

}  // namespace detour::data::jinja
