// tokenizer.json from outside, or (JSON with "tokens") a GGUF's tokenizer: any text loads or ends
// in an Error, and what loads encodes anything.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "core/error.h"
#include "core/json.h"
#include "data/gguf_tokenizer.h"
#include "data/tokenizer.h"

namespace detour::data {
namespace {

template <typename T>
std::vector<T> Values(const Json& json, const char* key) {
  std::vector<T> values;
  if (!HasKey(json, key, "fuzz") || !json[key].is_array()) return values;
  for (const Json& value : json[key]) {
    if constexpr (std::is_same_v<T, std::string>) {
      values.push_back(value.is_string() ? value.get<T>() : value.dump());
    } else {
      const double number = value.is_number() ? value.get<double>() : 0;
      values.push_back(static_cast<T>(std::clamp(number, -1e6, 1e6)));
    }
  }
  return values;
}

std::unique_ptr<Tokenizer> LoadGguf(const Json& json) {
  GgufTokenizer gguf{.model = GetStringOr(json, "model", "fuzz", ""),
                     .pre = GetStringOr(json, "pre", "fuzz", ""),
                     .tokens = Values<std::string>(json, "tokens"),
                     .scores = Values<float>(json, "scores"),
                     .token_type = Values<int32_t>(json, "token_type"),
                     .merges = Values<std::string>(json, "merges")};
  gguf.add_space_prefix = GetBoolOr(json, "add_space_prefix", "fuzz", true);
  gguf.bos_token_id = GetIntOr(json, "bos_token_id", "fuzz", 0);
  gguf.eos_token_id = gguf.unknown_token_id = GetIntOr(json, "eos_token_id", "fuzz", 1);
  gguf.add_eos_token = true;
  return Tokenizer::FromGguf(gguf, "fuzz");
}

void Run(std::string_view text) {
  const Json json = ParseJson(text, "fuzz");
  const auto tokenizer = json.is_object() && json.contains("tokens")
                             ? LoadGguf(json)
                             : LoadTokenizerJson(text, "fuzz");
  const std::string_view head = text.substr(0, 512);
  for (const std::string_view sample :
       {std::string_view("Hello  world, it's 1234!\n\n\xFF\xC3 \xE4\xB8\x96 aaaa e\xCC\x81"),
        head}) {
    const auto ids = tokenizer->Encode(sample, {.add_special_tokens = true});
    tokenizer->Decode(ids);
    tokenizer->Decode(ids, true);
    for (const int32_t id : ids) tokenizer->TokenText(id);
  }
}

}  // namespace
}  // namespace detour::data

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    detour::data::Run(std::string_view(reinterpret_cast<const char*>(data), size));
  } catch (const detour::Error&) {
  }
  return 0;
}
