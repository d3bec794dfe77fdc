// SHA-256 (FIPS 180-4): names the exact bytes of tokenizers, sources and shards in manifests.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace detour {

/// Incremental: any split of the input into Update calls gives the same digest. Not thread-safe.
class Sha256 {
 public:
  void Update(std::string_view bytes);
  /// 64 lower-case hex digits of everything so far. Ends the object: no Update or Hex afterwards.
  std::string Hex();

 private:
  void Block(const uint8_t* p);
  std::array<uint32_t, 8> h_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> buffer_;
  size_t buffered_ = 0;
  uint64_t num_bytes_ = 0;
};

std::string Sha256Hex(std::string_view bytes);
/// Streams the file. Error("core.sha256") with path and reason if it cannot be read.
std::string Sha256File(const std::string& path);

}  // namespace detour
