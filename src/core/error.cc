#include "core/error.h"

namespace detour::internal {

void CheckFailed(const char* file, int line, const char* condition, const std::string& detail) {
  throw std::logic_error(fmt::format("{}:{}: check failed: {}{}{}", file, line, condition,
                                     detail.empty() ? "" : ": ", detail));
}

}  // namespace detour::internal
