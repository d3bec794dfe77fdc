#include <algorithm>
#include <set>
#include <type_traits>

#include "core/error.h"
#include "io/atomic.h"
#include "io/gguf.h"
#include "io/posix.h"

namespace detour::io {
namespace {

constexpr uint64_t kAlignment = 32;
constexpr int64_t kChunkElements = 1 << 18;
constexpr size_t kMaxNameBytes = 63;  // ggml refuses longer ones

uint64_t Align(uint64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

template <typename T>
struct IsVector : std::false_type {};
template <typename T>
struct IsVector<std::vector<T>> : std::true_type {};

template <typename T>
constexpr GgufKind KindOf() {
  if constexpr (std::is_same_v<T, uint8_t>) return GgufKind::kU8;
  if constexpr (std::is_same_v<T, int8_t>) return GgufKind::kI8;
  if constexpr (std::is_same_v<T, uint16_t>) return GgufKind::kU16;
  if constexpr (std::is_same_v<T, int16_t>) return GgufKind::kI16;
  if constexpr (std::is_same_v<T, uint32_t>) return GgufKind::kU32;
  if constexpr (std::is_same_v<T, int32_t>) return GgufKind::kI32;
  if constexpr (std::is_same_v<T, float>) return GgufKind::kF32;
  if constexpr (std::is_same_v<T, bool>) return GgufKind::kBool;
  if constexpr (std::is_same_v<T, std::string>) return GgufKind::kString;
  if constexpr (std::is_same_v<T, uint64_t>) return GgufKind::kU64;
  if constexpr (std::is_same_v<T, int64_t>) return GgufKind::kI64;
  if constexpr (std::is_same_v<T, double>) return GgufKind::kF64;
  if constexpr (IsVector<T>::value) return GgufKind::kArray;
}

// The head, as it grows.
class Head {
 public:
  template <typename T>
  void Put(const T& value) {
    if constexpr (std::is_same_v<T, std::string>) {
      Put<uint64_t>(value.size());
      bytes_ += value;
    } else if constexpr (IsVector<T>::value) {
      Put(KindOf<typename T::value_type>());
      Put<uint64_t>(value.size());
      for (const auto& item : value) Put(item);
    } else {
      static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
      bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
    }
  }
  void Pad() { bytes_.resize(Align(bytes_.size()), '\0'); }
  std::span<const std::byte> bytes() const { return std::as_bytes(std::span(bytes_)); }

 private:
  std::string bytes_;
};

int64_t NumElements(const GgufTensorToWrite& tensor) {
  int64_t num_elements = 1;
  for (const int64_t size : tensor.shape) num_elements *= size;
  return num_elements;
}

uint64_t NumBytes(const GgufTensorToWrite& tensor) {
  const GgufTypeInfo& type = GgufTypeOf(tensor.type);
  return NumElements(tensor) / type.block_size * type.block_bytes;
}

Head MakeHead(const std::vector<std::pair<std::string, GgufData>>& metadata,
              const std::vector<GgufTensorToWrite>& tensors) {
  Head head;
  head.Put<uint32_t>(0x46554747);  // "GGUF"
  head.Put<uint32_t>(3);
  head.Put<uint64_t>(tensors.size());
  head.Put<uint64_t>(metadata.size());
  std::set<std::string_view> names;
  for (const auto& [key, data] : metadata) {
    DETOUR_CHECK(!key.empty() && key != "general.alignment" && names.insert(key).second, "key {}",
                 key);
    head.Put(key);
    std::visit(
        [&](const auto& value) {
          head.Put(KindOf<std::decay_t<decltype(value)>>());
          head.Put(value);
        },
        data);
  }
  names.clear();
  uint64_t offset = 0;
  for (const GgufTensorToWrite& tensor : tensors) {
    const bool known = tensor.type == GgufType::kF32 || tensor.type == GgufType::kF16 ||
                       tensor.type == GgufType::kQ8_0;
    DETOUR_CHECK(known && !tensor.name.empty() && tensor.name.size() <= kMaxNameBytes &&
                     names.insert(tensor.name).second && !tensor.shape.empty() &&
                     tensor.shape.size() <= 4 &&
                     tensor.shape.back() % GgufTypeOf(tensor.type).block_size == 0,
                 "tensor {} [{}]", tensor.name, fmt::join(tensor.shape, ", "));
    head.Put(tensor.name);
    head.Put(static_cast<uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size) head.Put(*size);
    head.Put(tensor.type);
    head.Put(offset);
    offset += Align(NumBytes(tensor));
  }
  head.Pad();
  return head;
}

// The data of one tensor and its padding.
void WriteTensor(const GgufTensorToWrite& tensor, const std::string& path, FileWriter& writer) {
  const int64_t num_elements = NumElements(tensor);
  const int64_t row_size = std::max<int64_t>(tensor.shape.back(), 1);
  const int64_t chunk = std::max<int64_t>(kChunkElements / row_size, 1) * row_size;
  std::vector<float> values;
  std::vector<std::byte> bytes;
  for (int64_t begin = 0; begin < num_elements; begin += chunk) {
    values.resize(std::min(chunk, num_elements - begin));
    tensor.read(begin, values);
    if (!QuantizeGguf(values, tensor.type, &bytes)) {
      Fail("io.gguf", "{}: {}: its values are too large or not finite for {}. Hint: write F32",
           path, tensor.name, GgufTypeOf(tensor.type).name);
    }
    writer.Write(bytes);
  }
  const uint64_t num_bytes = NumBytes(tensor);
  writer.Write(std::vector<std::byte>(Align(num_bytes) - num_bytes));
}

}  // namespace

void WriteGguf(const std::string& path,
               const std::vector<std::pair<std::string, GgufData>>& metadata,
               const std::vector<GgufTensorToWrite>& tensors) {
  const Head head = MakeHead(metadata, tensors);
  AtomicFile file(path);
  FileWriter writer(file.path());
  writer.Write(head.bytes());
  for (const GgufTensorToWrite& tensor : tensors) WriteTensor(tensor, path, writer);
  writer.Finish();
  file.Commit();
}

}  // namespace detour::io
