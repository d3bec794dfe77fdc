// Any bytes: Error or a value that survives being written and read again; no other way out.
#include "core/json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using detour::Json;
  static constexpr std::string_view kKnown[] = {"hidden_size", "num_layers"};
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  Json json;
  try {
    json = detour::ParseJson(text, "fuzz");
  } catch (const detour::Error&) {
    return 0;
  }
  DETOUR_CHECK(detour::ParseJson(json.dump(), "again") == json);
  try {
    detour::GetIntOr(json, "a", "fuzz", 1, -5, 5);
    detour::GetDoubleOr(json, "b", "fuzz", 1);
    detour::CheckKnownKeys(json, kKnown, "fuzz");
  } catch (const detour::Error&) {
  }
  return 0;
}
