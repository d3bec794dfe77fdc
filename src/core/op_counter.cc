#include "core/op_counter.h"

namespace detour {

OpCounter& GlobalOpCounter() {
  static OpCounter counter;
  return counter;
}

}  // namespace detour
