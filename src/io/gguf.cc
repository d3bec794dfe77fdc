#include "io/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/error.h"
#include "core/json.h"
#include "io/posix.h"

namespace detour::io {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

// Bounds on what a hostile head may cost; real ones have some hundred keys, some thousand tensors
// and vocabularies of less than 20 MB.
constexpr uint64_t kMaxHeadBytes = uint64_t{128} << 20;
constexpr uint64_t kMaxKeys = 1 << 16;
constexpr uint64_t kMaxTensors = 1 << 18;
constexpr int64_t kMaxItemsRead = int64_t{1} << 22;
constexpr uint64_t kMaxNameBytes = 65535;
constexpr int kMaxNesting = 4;
constexpr uint32_t kMaxDims = 4;
constexpr uint32_t kDefaultAlignment = 32;

struct Kind {
  const char* name;
  uint64_t bytes;  // in the file; of a string or array the least
};
constexpr Kind kKinds[] = {{"u8", 1},  {"i8", 1},  {"u16", 2},  {"i16", 2},    {"u32", 4},
                           {"i32", 4}, {"f32", 4}, {"bool", 1}, {"string", 8}, {"array", 12},
                           {"u64", 8}, {"i64", 8}, {"f64", 8}};

bool HasOwnLength(GgufKind kind) { return kind == GgufKind::kString || kind == GgufKind::kArray; }

template <typename T>
T Load(std::span<const std::byte> bytes) {
  T value;
  std::memcpy(&value, bytes.data(), sizeof(value));
  return value;
}

// Reads the head from front to back; what does not fit is an Error.
class Cursor {
 public:
  Cursor(std::span<const std::byte> bytes, std::string_view path) : bytes_(bytes), path_(path) {}
  // What is being read, for messages; must live until the next call.
  void SetPlace(std::string_view place) { place_ = place; }
  uint64_t offset() const { return offset_; }

  template <typename... Args>
  [[noreturn]] void FailHere(fmt::format_string<Args...> format, Args&&... args) const {
    Fail("io.gguf", "{}: {}: {}", path_, Printable(place_),
         fmt::format(format, std::forward<Args>(args)...));
  }

  std::span<const std::byte> Take(uint64_t size) {
    if (size > bytes_.size() - offset_) FailShort(size, 1);
    const auto taken = bytes_.subspan(offset_, size);
    offset_ += size;
    return taken;
  }
  template <typename T>
  T Read() {
    return Load<T>(Take(sizeof(T)));
  }
  std::string_view ReadString() {
    const auto bytes = Take(Read<uint64_t>());
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  // A count of things that take at least `bytes_each`: refused before any work where they cannot be
  // there.
  uint64_t ReadCount(uint64_t bytes_each) {
    const auto count = Read<uint64_t>();
    if (count > (bytes_.size() - offset_) / bytes_each) FailShort(count, bytes_each);
    return count;
  }
  GgufKind ReadKind() {
    const auto kind = Read<uint32_t>();
    if (kind >= std::size(kKinds)) FailHere("value type {} is unknown", kind);
    return static_cast<GgufKind>(kind);
  }
  GgufValue ReadValue(GgufKind kind, int nesting);

 private:
  [[noreturn]] void FailShort(uint64_t count, uint64_t bytes_each) const {
    const std::string what = bytes_each == 1
                                 ? fmt::format("{} bytes", count)
                                 : fmt::format("{} entries of {} bytes or more", count, bytes_each);
    FailHere("expected {} at offset {}, {} are left{}. Hint: the file is cut short or damaged",
             what, offset_, bytes_.size() - offset_,
             bytes_.size() == kMaxHeadBytes ? " of the 128 MiB that a head may have" : "");
  }

  std::span<const std::byte> bytes_;
  std::string_view path_, place_ = "head";
  uint64_t offset_ = 0;
};

GgufValue Cursor::ReadValue(GgufKind kind, int nesting) {
  if (kind == GgufKind::kString) {
    const std::string_view text = ReadString();
    return {kind, kind, 1, std::as_bytes(std::span(text))};
  }
  if (kind != GgufKind::kArray) {
    const auto bytes = Take(kKinds[static_cast<int>(kind)].bytes);
    if (kind == GgufKind::kBool && Load<uint8_t>(bytes) > 1) {
      FailHere("expected a bool of 0 or 1, got {}", Load<uint8_t>(bytes));
    }
    return {kind, kind, 1, bytes};
  }
  if (nesting == kMaxNesting) FailHere("arrays nest deeper than {}", kMaxNesting);
  const GgufKind item_kind = ReadKind();
  const uint64_t item_bytes = kKinds[static_cast<int>(item_kind)].bytes;
  const uint64_t num_items = ReadCount(item_bytes);
  const uint64_t begin = offset_;
  if (HasOwnLength(item_kind)) {
    for (uint64_t i = 0; i < num_items; ++i) ReadValue(item_kind, nesting + 1);
  } else {
    const auto items = Take(num_items * item_bytes);
    if (item_kind == GgufKind::kBool) {
      const auto bad =
          std::find_if(items.begin(), items.end(), [](std::byte b) { return b > std::byte{1}; });
      if (bad != items.end()) {
        FailHere("expected bools of 0 or 1, got {}", static_cast<int>(*bad));
      }
    }
  }
  return {kind, item_kind, static_cast<int64_t>(num_items), bytes_.subspan(begin, offset_ - begin)};
}

// A key or a tensor's name.
std::string_view ReadName(Cursor& in, const char* what) {
  in.SetPlace(what);
  const std::string_view name = in.ReadString();
  if (name.empty() || name.size() > kMaxNameBytes) {
    in.FailHere("expected a name of 1 to {} bytes, got {}", kMaxNameBytes, name.size());
  }
  in.SetPlace(name);
  return name;
}

std::string Show(GgufType type, std::span<const int64_t> shape) {
  const GgufTypeInfo* const info = FindGgufType(type);
  return fmt::format("{} [{}]", info == nullptr ? "?" : info->name, fmt::join(shape, ", "));
}

struct Entry {
  const std::string* name;
  GgufTensor* tensor;
  uint64_t begin, num_bytes;  // in the data
};

// Name, dims, type and offset of one tensor, into `tensors`; its bytes are not known yet.
Entry ReadTensorEntry(Cursor& in, std::map<std::string, GgufTensor, std::less<>>& tensors) {
  const std::string_view name = ReadName(in, "tensor name");
  GgufTensor tensor;
  const auto num_dims = in.Read<uint32_t>();
  if (num_dims > kMaxDims) in.FailHere("expected at most {} dims, got {}", kMaxDims, num_dims);
  for (uint32_t i = 0; i < num_dims; ++i) {
    const auto size = in.Read<uint64_t>();
    if (size > std::numeric_limits<int64_t>::max()) in.FailHere("a dim of {}", size);
    tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(size));
  }
  tensor.type = static_cast<GgufType>(in.Read<uint32_t>());
  const GgufTypeInfo* const type = FindGgufType(tensor.type);
  if (type == nullptr) {
    in.FailHere("tensor type {} is unknown", static_cast<uint32_t>(tensor.type));
  }
  const int64_t row = tensor.shape.empty() ? 1 : tensor.shape.back();
  if (row % type->block_size != 0) {
    in.FailHere("{}: expected rows of whole blocks of {}", Show(tensor.type, tensor.shape),
                type->block_size);
  }
  // Also the elements, not only their bytes, and the product of some of the dims must fit.
  int64_t product = 1, num_bytes = 0;
  bool overflow = false, none = false;
  for (const int64_t size : tensor.shape) {
    none |= size == 0;
    overflow |= __builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product);
  }
  overflow |=
      __builtin_mul_overflow(none ? 0 : product / type->block_size, type->block_bytes, &num_bytes);
  if (overflow) in.FailHere("{} is too large", Show(tensor.type, tensor.shape));
  const auto begin = in.Read<uint64_t>();
  const auto [it, is_new] = tensors.emplace(name, std::move(tensor));
  if (!is_new) in.FailHere("the tensor occurs twice");
  return {&it->first, &it->second, begin, static_cast<uint64_t>(num_bytes)};
}

uint32_t ReadAlignment(const std::map<std::string, GgufValue, std::less<>>& metadata,
                       const std::string& path) {
  const auto it = metadata.find("general.alignment");
  if (it == metadata.end()) return kDefaultAlignment;
  const std::optional<int64_t> value =
      it->second.kind() == GgufKind::kU32 ? it->second.AsInt() : std::nullopt;
  if (!value || !std::has_single_bit(static_cast<uint64_t>(*value))) {
    Fail("io.gguf", "{}: general.alignment: expected a power of two as u32, got {}", path,
         value ? std::to_string(*value) : GgufKindName(it->second.kind()));
  }
  return static_cast<uint32_t>(*value);
}

// Every tensor in the data, at its alignment, no two sharing a byte. Gaps are allowed.
void PlaceTensors(std::vector<Entry> entries, std::span<const std::byte> data, uint32_t alignment,
                  const std::string& path) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.num_bytes) < std::pair(b.begin, b.num_bytes);
  });
  uint64_t end = 0;
  for (const Entry& entry : entries) {
    const auto fail = [&](const std::string& what) {
      Fail("io.gguf", "{}: {}: {}", path, Printable(*entry.name), what);
    };
    if (entry.begin > data.size() || entry.num_bytes > data.size() - entry.begin) {
      fail(
          fmt::format("{} takes {} bytes at {}, the file has {} bytes of data. Hint: the file is "
                      "cut short or damaged",
                      Show(entry.tensor->type, entry.tensor->shape), entry.num_bytes, entry.begin,
                      data.size()));
    }
    if (entry.begin % alignment != 0) {
      fail(fmt::format("offset {} is no multiple of the alignment, {}", entry.begin, alignment));
    }
    entry.tensor->bytes = data.subspan(entry.begin, entry.num_bytes);
    if (entry.num_bytes == 0) continue;
    if (entry.begin < end) fail(fmt::format("offset {} overlaps another tensor", entry.begin));
    end = entry.begin + entry.num_bytes;
  }
}

int ReadVersion(Cursor& in, const std::string& path) {
  if (in.Read<uint32_t>() != 0x46554747) {  // "GGUF"
    Fail("io.gguf", "{}: expected the four bytes GGUF at the start. Hint: this is no GGUF file",
         path);
  }
  const auto version = in.Read<uint32_t>();
  if (version != 2 && version != 3) {
    Fail("io.gguf", "{}: expected version 2 or 3, got {}{}", path, version,
         version != 0 && (version & 0xffff) == 0 ? ". Hint: a file of a big-endian machine" : "");
  }
  return static_cast<int>(version);
}

}  // namespace

const char* GgufKindName(GgufKind kind) { return kKinds[static_cast<int>(kind)].name; }

std::optional<int64_t> GgufValue::AsInt() const {
  switch (kind_) {
    case GgufKind::kU8:
      return Load<uint8_t>(bytes_);
    case GgufKind::kI8:
      return Load<int8_t>(bytes_);
    case GgufKind::kU16:
      return Load<uint16_t>(bytes_);
    case GgufKind::kI16:
      return Load<int16_t>(bytes_);
    case GgufKind::kU32:
      return Load<uint32_t>(bytes_);
    case GgufKind::kI32:
      return Load<int32_t>(bytes_);
    case GgufKind::kI64:
      return Load<int64_t>(bytes_);
    case GgufKind::kU64: {
      const auto value = Load<uint64_t>(bytes_);
      if (value > std::numeric_limits<int64_t>::max()) return std::nullopt;
      return static_cast<int64_t>(value);
    }
    default:
      return std::nullopt;
  }
}

std::optional<double> GgufValue::AsDouble() const {
  if (kind_ == GgufKind::kF32) return Load<float>(bytes_);
  if (kind_ == GgufKind::kF64) return Load<double>(bytes_);
  const std::optional<int64_t> value = AsInt();
  if (!value) return std::nullopt;
  return static_cast<double>(*value);
}

std::optional<bool> GgufValue::AsBool() const {
  if (kind_ != GgufKind::kBool) return std::nullopt;
  return Load<uint8_t>(bytes_) != 0;
}

std::optional<std::string_view> GgufValue::AsString() const {
  if (kind_ != GgufKind::kString) return std::nullopt;
  return std::string_view(reinterpret_cast<const char*>(bytes_.data()), bytes_.size());
}

void GgufValue::ForEach(const std::function<void(const GgufValue&)>& fn) const {
  if (kind_ != GgufKind::kArray) return;
  Cursor in(bytes_, "");
  for (int64_t i = 0; i < num_items_; ++i) fn(in.ReadValue(item_kind_, 1));
}

int64_t GgufTensor::NumElements() const {
  int64_t num_elements = 1;
  for (const int64_t size : shape) num_elements *= size;
  return num_elements;
}

GgufFile GgufFile::Parse(std::span<const std::byte> bytes, const std::string& name) {
  GgufFile file;
  file.path_ = name;
  Cursor in(bytes.first(std::min<uint64_t>(bytes.size(), kMaxHeadBytes)), name);
  file.version_ = ReadVersion(in, name);
  // A tensor takes at least the lengths of name and dims, a type and an offset; a key its own
  // length, a type and a byte.
  in.SetPlace("number of tensors");
  const uint64_t num_tensors = in.ReadCount(8 + 4 + 4 + 8);
  if (num_tensors > kMaxTensors) {
    in.FailHere("expected at most {}, got {}", kMaxTensors, num_tensors);
  }
  in.SetPlace("number of keys");
  const uint64_t num_keys = in.ReadCount(8 + 4 + 1);
  if (num_keys > kMaxKeys) in.FailHere("expected at most {}, got {}", kMaxKeys, num_keys);

  for (uint64_t i = 0; i < num_keys; ++i) {
    const std::string_view key = ReadName(in, "key");
    const GgufKind kind = in.ReadKind();
    if (!file.metadata_.emplace(key, in.ReadValue(kind, 0)).second) {
      in.FailHere("the key occurs twice");
    }
  }
  std::vector<Entry> entries;
  for (uint64_t i = 0; i < num_tensors; ++i) {
    entries.push_back(ReadTensorEntry(in, file.tensors_));
  }
  const uint64_t alignment = ReadAlignment(file.metadata_, name);
  const uint64_t data_begin = (in.offset() + alignment - 1) / alignment * alignment;
  PlaceTensors(std::move(entries), bytes.subspan(std::min<uint64_t>(data_begin, bytes.size())),
               static_cast<uint32_t>(alignment), name);
  return file;
}

GgufFile GgufFile::Open(const std::string& path) {
  Mapping mapping;
  try {
    mapping = MapFile(path);
  } catch (const Error& error) {
    Fail("io.gguf", "{}", error.what() + std::string_view("[io.read] ").size());
  }
  GgufFile file = Parse(mapping.bytes, path);
  file.mapping_ = std::move(mapping.owner);
  return file;
}

// --- Tensors

const GgufTensor& GgufFile::Get(const std::string& name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) Fail("io.gguf", "{}: {}: no such tensor", path_, Printable(name));
  return it->second;
}

void GgufFile::CheckReadable(const std::string& name, const GgufTensor& tensor) const {
  if (!GgufTypeOf(tensor.type).decoded) {
    Fail(
        "io.gguf",
        "{}: {}: {}: this type is not supported. Hint: quantize the original model to F16, Q8_0 or "
        "a type Q2_K to Q6_K",
        path_, Printable(name), Show(tensor.type, tensor.shape));
  }
}

std::vector<float> GgufFile::ReadF32(const std::string& name,
                                     std::span<const int64_t> shape) const {
  const GgufTensor& tensor = Get(name);
  if (!shape.empty() &&
      !std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
    Fail("io.gguf", "{}: {}: expected shape [{}], got {}", path_, Printable(name),
         fmt::join(shape, ", "), Show(tensor.type, tensor.shape));
  }
  CheckReadable(name, tensor);
  std::vector<float> out(tensor.NumElements());
  DequantizeGguf(tensor.bytes, tensor.type, out);
  return out;
}

void GgufFile::ReadF32Into(const std::string& name, std::span<float> out) const {
  const GgufTensor& tensor = Get(name);
  CheckReadable(name, tensor);
  if (tensor.NumElements() != static_cast<int64_t>(out.size())) {
    Fail("io.gguf", "{}: {}: expected {} elements, got {}", path_, Printable(name), out.size(),
         Show(tensor.type, tensor.shape));
  }
  ConvertInParts(tensor.bytes, out, mapping_ != nullptr, [&](auto bytes, std::span<float> part) {
    DequantizeGguf(bytes, tensor.type, part);
  });
}

std::span<const float> GgufFile::ViewF32(const std::string& name) const {
  const GgufTensor& tensor = Get(name);
  const bool floats = mapping_ != nullptr && tensor.type == GgufType::kF32;
  return floats ? AlignedFloats(tensor.bytes) : std::span<const float>();
}

void GgufFile::ReadRowsF32Into(const std::string& name, int64_t row, std::span<float> out) const {
  const GgufTensor& tensor = Get(name);
  CheckReadable(name, tensor);
  const int64_t row_size = tensor.shape.empty() ? 1 : tensor.shape.back();
  const int64_t num_rows = row_size == 0 ? 0 : tensor.NumElements() / row_size;
  const int64_t num_wanted = row_size == 0 ? 0 : static_cast<int64_t>(out.size()) / row_size;
  if (static_cast<int64_t>(out.size()) != num_wanted * row_size || row < 0 || row > num_rows ||
      num_wanted > num_rows - row) {
    Fail("io.gguf", "{}: {}: expected {} elements from row {} on, got {}", path_, Printable(name),
         out.size(), row, Show(tensor.type, tensor.shape));
  }
  const GgufTypeInfo& type = GgufTypeOf(tensor.type);
  const int64_t row_bytes = row_size / type.block_size * type.block_bytes;
  DequantizeGguf(tensor.bytes.subspan(row * row_bytes, num_wanted * row_bytes), tensor.type, out);
}

// --- Metadata

const GgufValue& GgufFile::GetValue(std::string_view key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) Fail("io.gguf", "{}: key {} is missing", path_, Printable(key));
  return it->second;
}

const GgufValue& GgufFile::GetArray(std::string_view key) const {
  const GgufValue& value = GetValue(key);
  if (value.kind() != GgufKind::kArray || value.num_items() > kMaxItemsRead) {
    Fail("io.gguf", "{}: {}: expected an array of at most {} elements, got {}", path_,
         Printable(key), kMaxItemsRead,
         value.kind() == GgufKind::kArray ? std::to_string(value.num_items())
                                          : GgufKindName(value.kind()));
  }
  return value;
}

namespace {

// `got` if it is there, else what was expected of the value at `key`.
template <typename T>
T Expect(const std::optional<T>& got, const GgufValue& value, const std::string& path,
         std::string_view key, const char* expected) {
  if (!got) {
    Fail("io.gguf", "{}: {}: expected {}, got {}", path, Printable(key), expected,
         GgufKindName(value.kind()));
  }
  return *got;
}

}  // namespace

int64_t GgufFile::GetInt(std::string_view key, int64_t min, int64_t max) const {
  const GgufValue& value = GetValue(key);
  const int64_t got = Expect(value.AsInt(), value, path_, key, "an integer");
  if (got < min || got > max) {
    Fail("io.gguf", "{}: {}: expected {} to {}, got {}", path_, Printable(key), min, max, got);
  }
  return got;
}

double GgufFile::GetDouble(std::string_view key) const {
  const GgufValue& value = GetValue(key);
  return Expect(value.AsDouble(), value, path_, key, "a number");
}

bool GgufFile::GetBool(std::string_view key) const {
  const GgufValue& value = GetValue(key);
  return Expect(value.AsBool(), value, path_, key, "a bool");
}

std::string GgufFile::GetString(std::string_view key) const {
  const GgufValue& value = GetValue(key);
  return std::string(Expect(value.AsString(), value, path_, key, "a string"));
}

std::vector<int64_t> GgufFile::GetInts(std::string_view key) const {
  std::vector<int64_t> out;
  GetArray(key).ForEach([&](const GgufValue& item) {
    out.push_back(Expect(item.AsInt(), item, path_, key, "an array of integers"));
  });
  return out;
}

std::vector<double> GgufFile::GetDoubles(std::string_view key) const {
  std::vector<double> out;
  GetArray(key).ForEach([&](const GgufValue& item) {
    out.push_back(Expect(item.AsDouble(), item, path_, key, "an array of numbers"));
  });
  return out;
}

std::vector<bool> GgufFile::GetBools(std::string_view key) const {
  std::vector<bool> out;
  GetArray(key).ForEach([&](const GgufValue& item) {
    out.push_back(Expect(item.AsBool(), item, path_, key, "an array of bools"));
  });
  return out;
}

std::vector<std::string> GgufFile::GetStrings(std::string_view key) const {
  std::vector<std::string> out;
  GetArray(key).ForEach([&](const GgufValue& item) {
    out.emplace_back(Expect(item.AsString(), item, path_, key, "an array of strings"));
  });
  return out;
}

}  // namespace detour::io
