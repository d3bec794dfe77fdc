#include "io/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <set>
#include <string_view>

#include "core/error.h"
#include "core/half.h"
#include "core/json.h"
#include "core/threads.h"
#include "io/posix.h"

namespace detour::io {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
// Bounds the memory of a hostile header; a real one has about 6 values per tensor.
constexpr int64_t kMaxHeaderValues = 2'000'000;

struct DTypeRow {
  DType dtype;
  const char* name;
  int64_t bytes;
};
constexpr DTypeRow kDTypes[] = {{DType::kF64, "F64", 8}, {DType::kF32, "F32", 4},
                                {DType::kF16, "F16", 2}, {DType::kBF16, "BF16", 2},
                                {DType::kI64, "I64", 8}, {DType::kI32, "I32", 4},
                                {DType::kI16, "I16", 2}, {DType::kI8, "I8", 1},
                                {DType::kU8, "U8", 1},   {DType::kBool, "BOOL", 1}};

const DTypeRow& Row(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

template <typename... Args>
[[noreturn]] void FailTensor(const std::string& path, const std::string& tensor,
                             fmt::format_string<Args...> format, Args&&... args) {
  Fail("io.safetensors", "{}: {}: {}", path, Printable(tensor),
       fmt::format(format, std::forward<Args>(args)...));
}

std::string Show(DType dtype, std::span<const int64_t> shape) {
  return fmt::format("{} [{}{}]", DTypeName(dtype),
                     fmt::join(shape.first(std::min<size_t>(shape.size(), 8)), ", "),
                     shape.size() > 8 ? ", ..." : "");
}

// A list of non-negative integers that int64 holds.
std::vector<int64_t> ReadSizes(const Json& entry, const char* key, const std::string& path,
                               const std::string& tensor) {
  const auto it = entry.find(key);
  const bool is_list = it != entry.end() && it->is_array();
  if (!is_list || !std::all_of(it->begin(), it->end(), [](const Json& size) {
        return size.is_number_unsigned() &&
               size.get<uint64_t>() <= std::numeric_limits<int64_t>::max();
      })) {
    FailTensor(path, tensor, "\"{}\": expected a list of non-negative integers", key);
  }
  return it->get<std::vector<int64_t>>();
}

struct Entry {
  int64_t begin, end;
  const std::string* name;
  bool operator<(const Entry& other) const {
    return std::pair(begin, end) < std::pair(other.begin, other.end);
  }
};

// Dtype, shape and bytes of one tensor. `data` is everything after the header.
TensorInfo ReadEntry(const Json& json, std::span<const std::byte> data, const std::string& path,
                     const std::string& tensor) {
  if (!json.is_object()) FailTensor(path, tensor, "expected an object, got {}", json.type_name());
  static constexpr std::string_view kKeys[] = {"dtype", "shape", "data_offsets"};
  CheckKnownKeys(json, kKeys, path + ": " + Printable(tensor));
  const std::string dtype_name = GetString(json, "dtype", path + ": " + Printable(tensor));
  const auto row = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                [&](const DTypeRow& r) { return r.name == dtype_name; });
  if (row == std::end(kDTypes)) {
    FailTensor(path, tensor, "dtype {} is not supported", Printable(dtype_name));
  }
  TensorInfo info;
  info.dtype = row->dtype;
  info.shape = ReadSizes(json, "shape", path, tensor);
  int64_t num_bytes = row->bytes;
  for (const int64_t size : info.shape) {
    if (__builtin_mul_overflow(num_bytes, size, &num_bytes)) {
      FailTensor(path, tensor, "{} is too large", Show(info.dtype, info.shape));
    }
  }
  const std::vector<int64_t> offsets = ReadSizes(json, "data_offsets", path, tensor);
  if (offsets.size() != 2 || offsets[0] > offsets[1] ||
      offsets[1] > static_cast<int64_t>(data.size())) {
    FailTensor(
        path, tensor, "data_offsets: expected a range in the {} bytes of data, got [{}]",
        data.size(),
        fmt::join(offsets.begin(), offsets.begin() + std::min<size_t>(offsets.size(), 3), ", "));
  }
  if (offsets[1] - offsets[0] != num_bytes) {
    FailTensor(path, tensor, "{} has {} bytes, got {}", Show(info.dtype, info.shape), num_bytes,
               offsets[1] - offsets[0]);
  }
  info.bytes = data.subspan(offsets[0], num_bytes);
  return info;
}

std::map<std::string, std::string> ReadMetadata(const Json& json, const std::string& path) {
  std::map<std::string, std::string> metadata;
  bool good = json.is_object();
  for (auto it = json.begin(); good && it != json.end(); ++it) {
    good = it->is_string();
    if (good) metadata[it.key()] = it->get<std::string>();
  }
  if (!good) Fail("io.safetensors", "{}: __metadata__: expected an object of strings", path);
  return metadata;
}

// Every byte of data belongs to exactly one tensor.
void CheckContiguous(std::vector<Entry> entries, int64_t data_size, const std::string& path) {
  std::sort(entries.begin(), entries.end());
  int64_t end = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != end) {
      FailTensor(path, *entry.name, "data_offsets: expected to begin at {}, got {}: {}", end,
                 entry.begin, entry.begin < end ? "it overlaps another tensor" : "a hole");
    }
    end = entry.end;
  }
  if (end != data_size) {
    Fail("io.safetensors", "{}: the tensors have {} bytes, the file has {}", path, end, data_size);
  }
}

// out[i] = convert(in[i]) on unaligned input and output.
template <typename In, typename Out, typename Convert>
void ConvertAll(const std::byte* in, std::byte* out, int64_t n, Convert convert) {
  ParallelFor(0, n, 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      In value;
      std::memcpy(&value, in + i * sizeof(In), sizeof(In));
      const Out converted = convert(value);
      std::memcpy(out + i * sizeof(Out), &converted, sizeof(Out));
    }
  });
}

}  // namespace

const char* DTypeName(DType dtype) { return Row(dtype).name; }
int64_t DTypeBytes(DType dtype) { return Row(dtype).bytes; }

int64_t TensorInfo::NumElements() const {
  return static_cast<int64_t>(bytes.size()) / DTypeBytes(dtype);
}

void ConvertToF32(std::span<const std::byte> bytes, DType dtype, std::span<float> out) {
  const int64_t n = out.size();
  DETOUR_CHECK(bytes.size() == n * DTypeBytes(dtype), "{} bytes for {} {}", bytes.size(), n,
               DTypeName(dtype));
  std::byte* to = std::as_writable_bytes(out).data();
  switch (dtype) {
    case DType::kF64:
      return ConvertAll<double, float>(bytes.data(), to, n,
                                       [](double x) { return static_cast<float>(x); });
    case DType::kF32:
      return ConvertAll<uint32_t, uint32_t>(bytes.data(), to, n, [](uint32_t x) { return x; });
    case DType::kF16:
      return ConvertAll<uint16_t, uint32_t>(bytes.data(), to, n, F16ToF32Bits);
    case DType::kBF16:
      return ConvertAll<uint16_t, uint32_t>(bytes.data(), to, n,
                                            [](uint16_t x) { return uint32_t{x} << 16; });
    default:
      DETOUR_CHECK(false, "{} is not a floating-point type", DTypeName(dtype));
  }
}

std::vector<std::byte> ConvertF32(std::span<const float> values, DType dtype) {
  const int64_t n = values.size();
  const std::byte* from = std::as_bytes(values).data();
  std::vector<std::byte> out(n * DTypeBytes(dtype));
  switch (dtype) {
    case DType::kF32:
      ConvertAll<uint32_t, uint32_t>(from, out.data(), n, [](uint32_t x) { return x; });
      break;
    case DType::kF16:
      ConvertAll<uint32_t, uint16_t>(from, out.data(), n, F32ToF16Bits);
      break;
    case DType::kBF16:
      ConvertAll<uint32_t, uint16_t>(from, out.data(), n, F32ToBF16Bits);
      break;
    default:
      DETOUR_CHECK(false, "weights are stored as F32, F16 or BF16, not as {}", DTypeName(dtype));
  }
  return out;
}

SafetensorsFile SafetensorsFile::Parse(std::span<const std::byte> bytes, const std::string& name) {
  uint64_t header_bytes = 0;
  if (bytes.size() < kLengthBytes) {
    Fail("io.safetensors", "{}: expected at least {} bytes, got {}", name, kLengthBytes,
         bytes.size());
  }
  std::memcpy(&header_bytes, bytes.data(), kLengthBytes);
  if (header_bytes > bytes.size() - kLengthBytes || header_bytes > kMaxHeaderBytes) {
    Fail("io.safetensors",
         "{}: header length: expected at most {}, got {}. Hint: the file is cut short or no "
         "safetensors file",
         name, std::min<uint64_t>(bytes.size() - kLengthBytes, kMaxHeaderBytes), header_bytes);
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                              header_bytes);
  const std::span<const std::byte> data = bytes.subspan(kLengthBytes + header_bytes);
  SafetensorsFile file;
  file.path_ = name;
  try {
    const Json header = ParseJson(text, name + ": header", 4, kMaxHeaderValues);
    if (!header.is_object()) {
      Fail("io.safetensors", "{}: header: expected an object, got {}", name, header.type_name());
    }
    std::vector<Entry> entries;
    for (const auto& [tensor, json] : header.items()) {
      if (tensor == "__metadata__") {
        file.metadata_ = ReadMetadata(json, name);
        continue;
      }
      const auto it = file.tensors_.emplace(tensor, ReadEntry(json, data, name, tensor)).first;
      const int64_t begin = it->second.bytes.data() - data.data();
      entries.push_back({begin, begin + static_cast<int64_t>(it->second.bytes.size()), &it->first});
    }
    CheckContiguous(std::move(entries), data.size(), name);
  } catch (const Error& error) {
    if (error.code() != "json") throw;
    Fail("io.safetensors", "{}", error.what() + std::string_view("[json] ").size());
  }
  return file;
}

SafetensorsFile SafetensorsFile::Open(const std::string& path) {
  Mapping mapping;
  try {
    mapping = MapFile(path);
  } catch (const Error& error) {
    Fail("io.safetensors", "{}", error.what() + std::string_view("[io.read] ").size());
  }
  SafetensorsFile file = Parse(mapping.bytes, path);
  file.mapping_ = std::move(mapping.owner);
  return file;
}

const TensorInfo& SafetensorsFile::Get(const std::string& name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) FailTensor(path_, name, "no such tensor");
  return it->second;
}

std::vector<float> SafetensorsFile::ReadF32(const std::string& name,
                                            std::span<const int64_t> shape) const {
  const TensorInfo& info = Get(name);
  if (!shape.empty() &&
      !std::equal(shape.begin(), shape.end(), info.shape.begin(), info.shape.end())) {
    FailTensor(path_, name, "expected shape {}, got {}", Show(info.dtype, shape),
               Show(info.dtype, info.shape));
  }
  std::vector<float> out(info.NumElements());
  ReadF32Into(name, out);
  return out;
}

void SafetensorsFile::ReadF32Into(const std::string& name, std::span<float> out) const {
  const TensorInfo& info = Get(name);
  if (info.dtype != DType::kF32 && info.dtype != DType::kF16 && info.dtype != DType::kBF16 &&
      info.dtype != DType::kF64) {
    FailTensor(path_, name, "expected F32, F16, BF16 or F64, got {}", Show(info.dtype, info.shape));
  }
  if (info.NumElements() != static_cast<int64_t>(out.size())) {
    FailTensor(path_, name, "expected {} elements, got {}", out.size(),
               Show(info.dtype, info.shape));
  }
  ConvertInParts(info.bytes, out, mapping_ != nullptr,
                 [&](auto bytes, std::span<float> part) { ConvertToF32(bytes, info.dtype, part); });
}

std::span<const float> SafetensorsFile::ViewF32(const std::string& name) const {
  const TensorInfo& info = Get(name);
  const bool floats = mapping_ != nullptr && info.dtype == DType::kF32;
  return floats ? AlignedFloats(info.bytes) : std::span<const float>();
}

std::vector<int32_t> SafetensorsFile::ReadI32(const std::string& name) const {
  const TensorInfo& info = Get(name);
  std::vector<int32_t> out(info.NumElements());
  if (info.dtype == DType::kI32) {
    if (!out.empty()) std::memcpy(out.data(), info.bytes.data(), info.bytes.size());
  } else if (info.dtype == DType::kI64) {
    for (size_t i = 0; i < out.size(); ++i) {
      int64_t value;
      std::memcpy(&value, info.bytes.data() + i * sizeof(value), sizeof(value));
      if (value != static_cast<int32_t>(value)) {
        FailTensor(path_, name, "expected 32-bit integers, got {}", value);
      }
      out[i] = static_cast<int32_t>(value);
    }
  } else {
    FailTensor(path_, name, "expected I32 or I64, got {}", Show(info.dtype, info.shape));
  }
  return out;
}

void WriteSafetensors(const std::string& path, const std::vector<TensorToWrite>& tensors,
                      std::map<std::string, std::string> metadata) {
  metadata.try_emplace("format", "pt");
  std::vector<const TensorToWrite*> by_width;
  for (const TensorToWrite& tensor : tensors) {
    int64_t num_bytes = DTypeBytes(tensor.dtype);
    for (const int64_t size : tensor.shape) num_bytes *= size;
    DETOUR_CHECK(num_bytes == static_cast<int64_t>(tensor.bytes.size()),
                 "{}: {} has {} bytes, got {}", tensor.name, Show(tensor.dtype, tensor.shape),
                 num_bytes, tensor.bytes.size());
    by_width.push_back(&tensor);
  }
  std::stable_sort(by_width.begin(), by_width.end(), [](const auto* a, const auto* b) {
    return DTypeBytes(a->dtype) > DTypeBytes(b->dtype);
  });
  std::map<const TensorToWrite*, int64_t> begin;
  int64_t offset = 0;
  for (const TensorToWrite* tensor : by_width) {
    begin[tensor] = offset;
    offset += tensor->bytes.size();
  }

  std::vector<std::pair<std::string, Json>> entries = {{"__metadata__", metadata}};
  std::set<std::string_view> names = {"__metadata__"};
  for (const TensorToWrite& tensor : tensors) {
    DETOUR_CHECK(names.insert(tensor.name).second, "tensor {} twice", tensor.name);
    const int64_t at = begin[&tensor];
    const int64_t end = at + static_cast<int64_t>(tensor.bytes.size());
    entries.emplace_back(tensor.name, Json{{"dtype", DTypeName(tensor.dtype)},
                                           {"shape", tensor.shape},
                                           {"data_offsets", {at, end}}});
  }
  // Text by text: an ordered object searches all its keys at each insertion.
  std::string header;
  const auto dump = [](const Json& json) {
    return json.dump(-1, ' ', false, Json::error_handler_t::replace);
  };
  for (const auto& [name, json] : entries) {
    header += (header.empty() ? '{' : ',') + dump(name) + ':' + dump(json);
  }
  header += '}';
  header.resize((header.size() + 7) / 8 * 8, ' ');

  FileWriter writer(path);
  const uint64_t header_bytes = header.size();
  writer.Write(std::as_bytes(std::span(&header_bytes, 1)));
  writer.Write(std::as_bytes(std::span(header)));
  for (const TensorToWrite* tensor : by_width) writer.Write(tensor->bytes);
  writer.Finish();
}

}  // namespace detour::io
