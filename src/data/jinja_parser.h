// Tokens -> Program: jinja2's grammar, without the statements that load other templates.
#pragma once

#include <string>
#include <string_view>

#include "data/jinja_ast.h"

namespace detour::data::jinja {

/// Error("data.jinja") for a syntax error, a statement that is not supported, and what nests too
/// deep.
Program Parse(std::string_view source, const std::string& name);

}  // namespace detour::data::jinja
