#include "report/terminal.h"

#include <unistd.h>

#include <cstdlib>

namespace detour::report {

namespace {

constexpr char kReplacement[] = "\xEF\xBF\xBD";  // U+FFFD

/// U+202A … U+202E and U+2066 … U+2069: embeddings, overrides, isolates.
bool TurnsDirection(std::string_view s) {
  if (s.size() < 3 || s[0] != '\xE2') return false;
  const auto last = static_cast<unsigned char>(s[2]);
  return (s[1] == '\x80' && last >= 0xAA && last <= 0xAE) ||
         (s[1] == '\x81' && last >= 0xA6 && last <= 0xA9);
}

}  // namespace

bool IsTerminal(std::FILE* out) {
  const char* term = std::getenv("TERM");
  return isatty(fileno(out)) && !(term && std::string_view(term) == "dumb");
}

std::string Harmless(std::string_view utf8) {
  std::string out;
  for (size_t i = 0; i < utf8.size(); ++i) {
    const auto c = static_cast<unsigned char>(utf8[i]);
    const bool c1 =
        c == 0xC2 && i + 1 < utf8.size() && static_cast<unsigned char>(utf8[i + 1]) < 0xA0;
    if (c == 0x7F) {
      out += "\xE2\x90\xA1";  // U+2421
    } else if (c < 0x20 && c != '\n' && c != '\t') {
      out += "\xE2\x90";  // U+2400 + c
      out += static_cast<char>(0x80 + c);
    } else if (c1) {
      out += kReplacement;
      i += 1;
    } else if (TurnsDirection(utf8.substr(i))) {
      out += kReplacement;
      i += 2;
    } else {
      out += utf8[i];
    }
  }
  return out;
}

}  // namespace detour::report
