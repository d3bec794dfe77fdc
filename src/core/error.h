// Errors of the outside world (file, flag, request) are one exception type; a caller's bug is a
// failed CHECK.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace detour {

/// What went wrong outside the program: caught only in main (one line, exit code 1) and at a
/// request boundary. `what()` reads "[code] message", e.g. "[io.safetensors] x.safetensors:
/// expected f32 [64], got bf16 [32]".
class Error : public std::runtime_error {
 public:
  Error(std::string code, const std::string& message)
      : std::runtime_error("[" + code + "] " + message), code_(std::move(code)) {}
  const std::string& code() const { return code_; }

 private:
  std::string code_;
};

/// Throws Error. The message says what, what was expected, what was found, and a hint where there
/// is one.
template <typename... Args>
[[noreturn]] void Fail(const char* code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

namespace internal {
[[noreturn]] void CheckFailed(const char* file, int line, const char* condition,
                              const std::string& detail);
}  // namespace internal

}  // namespace detour

/// A condition that only a bug of ours can break. Throws std::logic_error with place, condition and
/// values.
#define DETOUR_CHECK(condition, ...)                                  \
  do {                                                                \
    if (!(condition)) [[unlikely]] {                                  \
      ::detour::internal::CheckFailed(__FILE__, __LINE__, #condition, \
                                      ::fmt::format("" __VA_ARGS__)); \
    }                                                                 \
  } while (false)
