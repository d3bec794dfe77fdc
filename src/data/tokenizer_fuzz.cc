// tokenizer.json from outside: any text loads or ends in an Error, and what loads encodes anything.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "core/error.h"
#include "data/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const auto tokenizer = detour::data::LoadTokenizerJson(text, "fuzz");
    const std::string_view head = text.substr(0, 512);
    for (const std::string_view sample :
         {std::string_view("Hello  world, it's 1234!\n\n\xFF\xC3 \xE4\xB8\x96 aaaa"), head}) {
      const auto ids = tokenizer->Encode(sample, {.add_special_tokens = true});
      tokenizer->Decode(ids);
      for (const int32_t id : ids) tokenizer->TokenText(id);
    }
  } catch (const detour::Error&) {
  }
  return 0;
}
