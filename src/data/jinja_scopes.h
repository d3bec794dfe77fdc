// Which names a block hides from the start.
#pragma once

#include "data/jinja_ast.h"

namespace detour::data::jinja {

/// jinja2 decides before it runs where a block's names come from. A name that a block sets before
/// anything in the block reads it, outside of every "if", and that no enclosing block mentions, is
/// the block's own from its start: undefined until set, also where a variable has this name. Fills
/// the `missing` of all blocks.
void ResolveScopes(Program* program);

}  // namespace detour::data::jinja
