// Any bytes: Error or tensors that lie inside them and can be read; no other way out.
#include <cstring>

#include "core/error.h"
#include "io/safetensors.h"

namespace {

void ParseAndRead(std::span<const std::byte> bytes) {
  using detour::Error;
  try {
    const auto file = detour::io::SafetensorsFile::Parse(bytes, "fuzz");
    for (const auto& [name, info] : file.tensors()) {
      DETOUR_CHECK(info.bytes.empty() ||
                   (info.bytes.data() >= bytes.data() &&
                    info.bytes.data() + info.bytes.size() <= bytes.data() + bytes.size()));
      DETOUR_CHECK(info.NumElements() * detour::io::DTypeBytes(info.dtype) == info.bytes.size());
      try {
        file.ReadF32(name);
      } catch (const Error&) {
        file.ReadI32(name);
      }
    }
  } catch (const Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  ParseAndRead(bytes);
  // Once more with a header length that fits: nearly every mutation breaks it, and would hide what
  // follows.
  uint64_t length = 0;
  if (size >= sizeof(length)) {
    std::vector<std::byte> fixed(bytes.begin(), bytes.end());
    std::memcpy(&length, data, sizeof(length));
    length %= size - sizeof(length) + 1;
    std::memcpy(fixed.data(), &length, sizeof(length));
    ParseAndRead(fixed);
  }
  return 0;
}
