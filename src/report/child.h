// A program run for what it prints.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace detour::report {

/// Standard output of a program (args[0] is its path) that reads `input`; nothing if it could not
/// be run or failed. Standard error passes through.
std::optional<std::string> OutputOf(const std::vector<std::string>& args, const std::string& input);

}  // namespace detour::report
