#include "data/jinja_lexer.h"

#include <algorithm>
#include <charconv>
#include <utility>

#include "core/json.h"
#include "data/jinja_text.h"
#include "data/utf8.h"

namespace detour::data::jinja {
namespace {

constexpr size_t kMaxTokens = 200'000;

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameChar(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || IsDigit(c);
}

class Lexer {
 public:
  Lexer(std::string_view source, const std::string& name) : source_(source), name_(name) {}

  std::vector<Token> Run() {
    while (at_ < source_.size()) Root();
    Emit(TokenType::kEnd, "");
    return std::move(tokens_);
  }

 private:
  template <typename... Args>
  [[noreturn]] void FailHere(fmt::format_string<Args...> format, Args&&... args) {
    FailAt(name_, Line(), format, std::forward<Args>(args)...);
  }

  // The line of at_, counted on from the place asked before.
  int Line() {
    if (at_ >= counted_) {
      line_ += std::count(source_.begin() + counted_, source_.begin() + at_, '\n');
      counted_ = at_;
    }
    return line_;
  }

  Token& Emit(TokenType type, std::string text) {
    if (tokens_.size() >= kMaxTokens) FailHere("more than {} tokens", kMaxTokens);
    return tokens_.emplace_back(Token{type, Line(), std::move(text)});
  }

  bool Ahead(std::string_view text, size_t from) const {
    return source_.substr(std::min(from, source_.size())).substr(0, text.size()) == text;
  }
  char Char(size_t i) const { return i < source_.size() ? source_[i] : '\0'; }
  size_t SkipSpace(size_t from) const { return from + SpacePrefix(source_.substr(from)); }

  // Moves on to `end`; what is there starts a line if the character before is a line's end.
  void Advance(size_t end) {
    at_ = end;
    line_starting_ = end > 0 && source_[end - 1] == '\n';
  }

  // Text up to the next tag, then the tag.
  void Root() {
    size_t begin = at_;
    while (true) {
      begin = source_.find('{', begin);
      if (begin == std::string_view::npos) {
        Emit(TokenType::kData, std::string(source_.substr(at_)));
        Advance(source_.size());
        return;
      }
      const char next = Char(begin + 1);
      if (next == '%' || next == '{' || next == '#') break;
      ++begin;
    }
    const char kind = source_[begin + 1];
    size_t end = begin + 2;
    const char sign = Char(end) == '-' || Char(end) == '+' ? source_[end++] : '\0';
    Data(source_.substr(at_, begin - at_), sign, kind != '{');
    const size_t raw_end = kind == '%' ? RawBegin(end) : 0;
    Advance(raw_end > 0 ? raw_end : end);
    if (raw_end > 0) {
      Raw();
    } else if (kind == '#') {
      Comment();
    } else {
      Emit(kind == '%' ? TokenType::kBlockBegin : TokenType::kVariableBegin, "");
      Tag(kind == '%');
    }
  }

  // The text before a tag: "-" takes all space before it, and lstrip_blocks the space between the
  // line's begin and a block or comment.
  void Data(std::string_view text, char sign, bool may_lstrip) {
    if (sign == '-') {
      text = text.substr(0, text.size() - SpaceSuffix(text));
    } else if (sign != '+' && may_lstrip) {
      const size_t newline = text.rfind('\n');
      const size_t line = newline == std::string_view::npos ? 0 : newline + 1;
      if ((line > 0 || line_starting_) && SpacePrefix(text.substr(line)) == text.size() - line) {
        text = text.substr(0, line);
      }
    }
    if (!text.empty()) Emit(TokenType::kData, std::string(text));
  }

  // The end of what follows "{%" if that is a raw tag, or 0.
  size_t RawBegin(size_t from) const {
    size_t at = SkipSpace(from);
    if (!Ahead("raw", at)) return 0;
    at = SkipSpace(at + 3);
    if (Ahead("-%}", at)) return SkipSpace(at + 3);
    return Ahead("%}", at) ? at + 2 : 0;
  }

  // The end of a "%}" or "#}" (`close`) at `from`, with its sign and what it trims; or 0.
  size_t CloseAt(size_t from, std::string_view close, bool may_keep = true) const {
    if (Char(from) == '-' && Ahead(close, from + 1)) return SkipSpace(from + 3);
    if (Char(from) == '+' && may_keep && Ahead(close, from + 1)) return from + 3;
    if (!Ahead(close, from)) return 0;
    return from + 2 + (close != "}}" && Char(from + 2) == '\n');
  }

  void Comment() {
    size_t close = source_.find("#}", at_);
    if (close == std::string_view::npos) FailHere("the comment has no end");
    if (close > at_ && (source_[close - 1] == '-' || source_[close - 1] == '+')) --close;
    Advance(CloseAt(close, "#}"));
  }

  void Raw() {
    size_t begin = at_;
    while (true) {
      begin = source_.find("{%", begin);
      if (begin == std::string_view::npos) FailHere("the raw block has no end");
      size_t at = begin + 2;
      const char sign = Char(at) == '-' || Char(at) == '+' ? source_[at++] : '\0';
      at = SkipSpace(at);
      if (Ahead("endraw", at)) {
        const size_t end = CloseAt(SkipSpace(at + 6), "%}");
        if (end > 0) {
          Data(source_.substr(at_, begin - at_), sign, true);
          Advance(end);
          return;
        }
      }
      begin += 2;
    }
  }

  void Tag(bool block) {
    std::string open;  // brackets that wait for their end
    while (at_ < source_.size()) {
      if (open.empty()) {
        if (const size_t end = CloseAt(at_, block ? "%}" : "}}", block); end > 0) {
          Emit(block ? TokenType::kBlockEnd : TokenType::kVariableEnd, "");
          Advance(end);
          return;
        }
      }
      if (const size_t space = SpacePrefix(source_.substr(at_)); space > 0) {
        Advance(at_ + space);
      } else if (!Number() && !Name() && !String()) {
        Operator(&open);
      }
    }
  }

  // (\d+_)*\d+ from `from`: its end, or `from`.
  size_t Digits(size_t from) const {
    size_t at = from;
    while (IsDigit(Char(at)) || (Char(at) == '_' && at > from && IsDigit(Char(at + 1)))) ++at;
    return at;
  }

  // The end of a number with a fraction or an exponent, or 0.
  size_t FloatEnd() const {
    if (at_ > 0 && source_[at_ - 1] == '.') return 0;
    const size_t whole = Digits(at_);
    if (whole == at_) return 0;
    size_t fraction = whole;
    if (Char(whole) == '.' && Digits(whole + 1) > whole + 1) fraction = Digits(whole + 1);
    if (Char(fraction) == 'e' || Char(fraction) == 'E') {
      const size_t digits = fraction + 1 + (Char(fraction + 1) == '+' || Char(fraction + 1) == '-');
      if (const size_t end = Digits(digits); end > digits) return end;
    }
    return fraction > whole ? fraction : 0;
  }

  // The end of an integer, or at_.
  size_t IntegerEnd(int* base) const {
    const auto run = [&](size_t at, auto accept) {
      while (accept(Char(at)) || (Char(at) == '_' && accept(Char(at + 1)))) ++at;
      return at;
    };
    *base = 10;
    if (Char(at_) == '0') {
      const char kind = Char(at_ + 1) | 0x20;
      const auto accept = [&](char c) {
        if (kind == 'x') return IsDigit(c) || ((c | 0x20) >= 'a' && (c | 0x20) <= 'f');
        return c >= '0' && c <= (kind == 'b' ? '1' : '7');
      };
      if (kind == 'x' || kind == 'b' || kind == 'o') {
        *base = kind == 'x' ? 16 : kind == 'b' ? 2 : 8;
        if (const size_t end = run(at_ + 2, accept); end > at_ + 2) return end;
        *base = 10;
      }
      return run(at_ + 1, [](char c) { return c == '0'; });
    }
    return IsDigit(Char(at_)) ? run(at_, IsDigit) : at_;
  }

  bool Number() {
    const size_t float_end = FloatEnd();
    int base = 10;
    const size_t end = float_end > 0 ? float_end : IntegerEnd(&base);
    if (end == at_) return false;
    std::string digits(source_.substr(at_, end - at_));
    std::erase(digits, '_');
    Token& token = Emit(float_end > 0 ? TokenType::kFloat : TokenType::kInteger, "");
    if (float_end > 0) {
      const std::optional<double> number = ParsePythonFloat(digits);
      if (!number) FailHere("not a number: {}", Printable(digits, 40));
      token.number = *number;
    } else {
      const char* begin = digits.data() + (base == 10 ? 0 : 2);
      const auto result =
          std::from_chars(begin, digits.data() + digits.size(), token.integer, base);
      if (result.ec != std::errc())
        FailHere("{}: an integer of more than 64 bits", Printable(digits, 40));
    }
    Advance(end);
    return true;
  }

  bool Name() {
    size_t end = at_;
    while (IsNameChar(Char(end))) ++end;
    if (end == at_) return false;
    Emit(TokenType::kName, std::string(source_.substr(at_, end - at_)));
    Advance(end);
    return true;
  }

  bool String() {
    const char quote = Char(at_);
    if (quote != '\'' && quote != '"') return false;
    size_t end = at_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) FailHere("the string has no end");
    Emit(TokenType::kString, Unescape(source_.substr(at_ + 1, end - at_ - 1)));
    Advance(end + 1);
    return true;
  }

  // Escapes of a Python string.
  std::string Unescape(std::string_view text) {
    std::string out;
    size_t i = 0;
    while (i < text.size()) {
      const char c = text[i++];
      if (c != '\\') {
        out += c;
        continue;
      }
      static constexpr std::string_view kLetters = "abfnrtv\\'\"", kValues = "\a\b\f\n\r\t\v\\'\"";
      const char letter = text[i++];
      if (const size_t known = kLetters.find(letter); known != std::string_view::npos) {
        out += kValues[known];
      } else if (letter >= '0' && letter <= '7') {
        size_t end = i;
        while (end < i + 2 && end < text.size() && text[end] >= '0' && text[end] <= '7') ++end;
        AppendCode(text.substr(i - 1, end - i + 1), 8, &out);
        i = end;
      } else if (letter == 'x' || letter == 'u' || letter == 'U') {
        const size_t length = letter == 'x' ? 2 : letter == 'u' ? 4 : 8;
        const std::string_view digits = text.substr(i, length);
        if (digits.size() < length)
          FailHere("\\{}: {} hexadecimal digits expected", letter, length);
        AppendCode(digits, 16, &out);
        i += length;
      } else if (letter == 'N') {
        FailHere("\\N{{...}} in a string is not supported");
      } else if (letter != '\n') {
        out += '\\';
        out += letter;
      }
    }
    return out;
  }

  void AppendCode(std::string_view digits, int base, std::string* out) {
    uint32_t code = 0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), code, base);
    if (result.ec != std::errc() || result.ptr != digits.data() + digits.size() ||
        code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
      FailHere("\"{}\" is no code point", Printable(digits));
    }
    AppendUtf8(code, out);
  }

  void Operator(std::string* open) {
    static constexpr std::string_view kTwo[] = {"//", "**", "==", "!=", ">=", "<="};
    const std::string_view two = source_.substr(at_, 2);
    const char c = source_[at_];
    if (std::find(std::begin(kTwo), std::end(kTwo), two) != std::end(kTwo)) {
      Emit(TokenType::kOperator, std::string(two));
      Advance(at_ + 2);
      return;
    }
    if (std::string_view("+-/*%~[](){}><=.:|,;").find(c) == std::string_view::npos) {
      FailHere("unexpected \"{}\"", Printable(source_.substr(at_, 1)));
    }
    if (c == '(' || c == '[' || c == '{') {
      *open += c == '(' ? ')' : c == '[' ? ']' : '}';
    } else if (c == ')' || c == ']' || c == '}') {
      if (open->empty() || open->back() != c) FailHere("unexpected \"{}\"", c);
      open->pop_back();
    }
    Emit(TokenType::kOperator, std::string(1, c));
    Advance(at_ + 1);
  }

  std::string_view source_;
  const std::string& name_;
  size_t at_ = 0, counted_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> Tokenize(std::string_view source, const std::string& name) {
  return Lexer(source, name).Run();
}

}  // namespace detour::data::jinja
