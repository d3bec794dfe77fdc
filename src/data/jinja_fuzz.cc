// A template and a conversation from outside: any text renders or ends in an Error, in bounded
// time. The first byte chooses the conversation.
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <string>
#include <string_view>

#include "core/error.h"
#include "data/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using detour::Json;
  static const Json tools = Json::parse(
      R"([{"type":"function","function":{"name":"f","parameters":{"a":{"type":"int"}}}}])");
  static const Json conversations[] = {
      Json::parse(R"([{"role":"user","content":"Hello \u00e9"}])"),
      Json::parse(R"([{"role":"system","content":" Be brief.\n"},{"role":"user","content":"1+1?"},
                      {"role":"assistant","content":"<think>2</think>2"},
                      {"role":"user","content":[{"type":"text","text":"ok"}]}])"),
      Json::array()};
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    const auto chat = detour::data::ChatTemplate::FromText(
        text, {{"bos_token", "<s>"}, {"eos_token", "</s>"}}, "fuzz");
    detour::data::ChatOptions options;
    options.add_generation_prompt = data[0] & 4;
    if (data[0] & 8) options.variables["tools"] = tools;
    // Small, so that the fuzzer sees many templates a second.
    options.limits = {
        .max_steps = 100'000, .max_output_bytes = 1 << 20, .max_memory_bytes = 4 << 20};
    options.clock = [] { return std::tm{.tm_mday = 26, .tm_mon = 6, .tm_year = 124}; };
    chat.Render(conversations[(data[0] & 3) % 3], options);
  } catch (const detour::Error&) {
  }
  return 0;
}
