// Token bytes arrive in pieces of characters; people and JSON want whole ones.
#pragma once

#include <string>
#include <string_view>

namespace detour::data {

/// Turns a stream of bytes into valid UTF-8. Bytes that no continuation can make a character become
/// U+FFFD, one per maximal subpart (as Python's errors="replace"); an unfinished character waits
/// for its rest. The concatenated output does not depend on where the input was cut. Not
/// thread-safe.
class Utf8Stream {
 public:
  /// The text that `bytes` completes: may be empty.
  std::string Push(std::string_view bytes);
  /// At the end of the stream: U+FFFD if a character was left unfinished, else nothing.
  std::string Flush();

 private:
  std::string pending_;  // at most 3 bytes
};

}  // namespace detour::data
