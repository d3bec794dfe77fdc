// Any bytes: Error or metadata and tensors that lie inside them and can be read; no other way out.
#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "io/gguf.h"

namespace {

using detour::Error;
using detour::io::GgufFile;
using detour::io::GgufValue;

// Runs all that may refuse.
template <typename... Fn>
void Try(Fn... fns) {
  const auto one = [](auto fn) {
    try {
      fn();
    } catch (const Error&) {
    }
  };
  (one(fns), ...);
}

void Walk(const GgufValue& value, size_t* num_bytes) {
  if (const auto text = value.AsString()) *num_bytes += text->size();
  int64_t num_items = 0;
  value.ForEach([&](const GgufValue& item) {
    ++num_items;
    Walk(item, num_bytes);
  });
  if (value.kind() == detour::io::GgufKind::kArray) DETOUR_CHECK(num_items == value.num_items());
}

void ParseAndRead(std::span<const std::byte> bytes) {
  try {
    const auto file = GgufFile::Parse(bytes, "fuzz");
    size_t num_bytes = 0;
    for (const auto& [key, value] : file.metadata()) {
      Walk(value, &num_bytes);
      Try([&, &k = key] { file.GetInt(k, -5, 5); }, [&, &k = key] { file.GetDouble(k); },
          [&, &k = key] { file.GetBool(k); }, [&, &k = key] { file.GetString(k); },
          [&, &k = key] { file.GetInts(k); }, [&, &k = key] { file.GetDoubles(k); },
          [&, &k = key] { file.GetBools(k); }, [&, &k = key] { file.GetStrings(k); });
    }
    for (const auto& [name, tensor] : file.tensors()) {
      num_bytes += tensor.bytes.size();
      DETOUR_CHECK(tensor.bytes.empty() ||
                   (tensor.bytes.data() >= bytes.data() &&
                    tensor.bytes.data() + tensor.bytes.size() <= bytes.data() + bytes.size()));
      Try([&, &n = name] { file.ReadF32(n); },
          [&, &n = name, &t = tensor] {
            const int64_t row_size = t.shape.empty() ? 1 : t.shape.back();
            std::vector<float> row(std::min<size_t>(row_size, 12 * bytes.size()));
            file.ReadRowsF32Into(n, t.NumElements() == 0 ? 0 : t.NumElements() / row_size - 1, row);
          });
    }
    DETOUR_CHECK(num_bytes <= bytes.size());  // nothing is there twice
  } catch (const Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  ParseAndRead(bytes);
  // Once more with magic, version and counts that are small: nearly every mutation of those breaks
  // them, and would hide what follows.
  if (size >= 24) {
    std::vector<std::byte> fixed(bytes.begin(), bytes.end());
    std::memcpy(fixed.data(), "GGUF\3\0\0\0", 8);
    for (const size_t at : {8, 16}) {
      std::fill_n(fixed.begin() + at + 1, 7, std::byte{0});
      fixed[at] &= std::byte{7};
    }
    ParseAndRead(fixed);
  }
  return 0;
}
