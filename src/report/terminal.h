// Text from elsewhere on a terminal.
#pragma once

#include <cstdio>
#include <string>
#include <string_view>

namespace detour::report {

/// Whether `out` is a terminal that can do more than print lines.
bool IsTerminal(std::FILE* out);

/// `utf8` (whole characters) without what a terminal would obey: control characters but line feed
/// and tab become their pictures (U+2400 …), those of C1 U+FFFD; characters that turn the
/// direction of writing become U+FFFD too.
std::string Harmless(std::string_view utf8);

}  // namespace detour::report
