// GGUF, versions 2 and 3, little-endian (docs/formats.md): a reader that trusts nothing,
// dequantization, and a writer. One file; models split over several (`split.count`) are left to the
// caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace detour::io {

// --- Tensor types

/// The types that are decoded, by their number in the file. A file may hold others; only reading
/// such a tensor fails.
enum class GgufType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

/// Elements are stored in blocks of `block_size` in `block_bytes`; no block crosses a row's end.
struct GgufTypeInfo {
  const char* name;  ///< "Q4_K", …
  int64_t block_size, block_bytes;
  bool decoded;  ///< DequantizeGguf knows it
};
/// Null for a number that no type has.
const GgufTypeInfo* FindGgufType(GgufType type);
/// FindGgufType of a type that is known (CHECK).
const GgufTypeInfo& GgufTypeOf(GgufType type);

/// F32 values of whole blocks: `bytes`, any alignment, are as many blocks as out.size() elements
/// have, of a decoded type (CHECK). Equal to the `gguf` package's to the bit (NaN stays NaN).
/// Parallel.
void DequantizeGguf(std::span<const std::byte> bytes, GgufType type, std::span<float> out);
/// F32, F16 (nearest, ties to even) or Q8_0, to the bit as the `gguf` package; whole blocks
/// (CHECK). False if a finite value does not fit: too large for F16, or for the F16 scale of its
/// Q8_0 block. A Q8_0 block takes no infinity or NaN either.
bool QuantizeGguf(std::span<const float> values, GgufType type, std::vector<std::byte>* out);

// --- Metadata

/// Value types by their number in the file.
enum class GgufKind : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};
const char* GgufKindName(GgufKind kind);  ///< "u8", …, "string", "array"

/// A checked value, still in the file: nothing is copied until it is asked for, so an array costs
/// nothing by lying there. Valid as long as the file.
class GgufValue {
 public:
  GgufValue(GgufKind kind, GgufKind item_kind, int64_t num_items, std::span<const std::byte> bytes)
      : kind_(kind), item_kind_(item_kind), num_items_(num_items), bytes_(bytes) {}
  GgufKind kind() const { return kind_; }
  GgufKind item_kind() const { return item_kind_; }  ///< of an array's elements; else kind()
  int64_t num_items() const { return num_items_; }   ///< of an array; else 1

  /// Nothing if the kind is another, or a u64 does not fit. A double may be stored as an integer,
  /// never the other way round.
  std::optional<int64_t> AsInt() const;
  std::optional<double> AsDouble() const;
  std::optional<bool> AsBool() const;
  std::optional<std::string_view> AsString() const;  ///< any bytes; UTF-8 is not checked
  /// Each element of an array in order (arrays in arrays too); nothing else has any.
  void ForEach(const std::function<void(const GgufValue&)>& fn) const;

 private:
  GgufKind kind_, item_kind_;
  int64_t num_items_;
  std::span<const std::byte> bytes_;  // of a string its characters, of an array its elements
};

// --- Reading

struct GgufTensor {
  GgufType type = GgufType::kF32;
  std::vector<int64_t> shape;        ///< rows first, as everywhere here; the file has it reversed
  std::span<const std::byte> bytes;  ///< into the mapped file, any alignment
  int64_t NumElements() const;
};

/// A memory-mapped file, read only. Checked at Open, in time and memory that the head alone bounds
/// (≤ 128 MiB): magic and version, counts against the bytes that are left, string lengths, value
/// kinds, nesting (≤ 4), booleans, keys and names (not empty, none twice), alignment, dims (≤ 4,
/// whole blocks a row, no overflow), offsets (aligned, in the file, no overlap).
/// The file must not shrink while it is open (replacing it by a rename is fine).
/// Errors: Error("io.gguf"), message with path, key or tensor, expected and found. Thread-safe
/// after Open.
class GgufFile {
 public:
  static GgufFile Open(const std::string& path);
  /// The same checks on bytes in memory that must outlive the object; `name` stands in messages.
  static GgufFile Parse(std::span<const std::byte> bytes, const std::string& name);

  const std::string& path() const { return path_; }
  int version() const { return version_; }
  const std::map<std::string, GgufTensor, std::less<>>& tensors() const { return tensors_; }
  bool Has(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  /// Error if absent.
  const GgufTensor& Get(const std::string& name) const;

  /// Error for a type that is not decoded, or when shape differs from `shape` (an empty one accepts
  /// any). Needs no memory but the result.
  std::vector<float> ReadF32(const std::string& name, std::span<const int64_t> shape = {}) const;
  void ReadF32Into(const std::string& name, std::span<float> out) const;
  /// The values where they lie in the mapped file, valid as long as this object; empty if they are
  /// no aligned F32, or were parsed from memory.
  std::span<const float> ViewF32(const std::string& name) const;
  /// Rows [row, row + n) where n = out.size() / the last dim; Error if they are not there.
  void ReadRowsF32Into(const std::string& name, int64_t row, std::span<float> out) const;

  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  bool HasKey(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }
  /// Error if the key is absent, the kind is another or the value is out of [min, max].
  int64_t GetInt(std::string_view key, int64_t min = std::numeric_limits<int64_t>::min(),
                 int64_t max = std::numeric_limits<int64_t>::max()) const;
  double GetDouble(std::string_view key) const;
  bool GetBool(std::string_view key) const;
  std::string GetString(std::string_view key) const;
  /// Arrays of at most 4 Mi elements; Error beyond.
  std::vector<int64_t> GetInts(std::string_view key) const;
  std::vector<double> GetDoubles(std::string_view key) const;
  std::vector<bool> GetBools(std::string_view key) const;
  std::vector<std::string> GetStrings(std::string_view key) const;
  /// `fallback` where the key is absent.
  int64_t GetIntOr(std::string_view key, int64_t fallback,
                   int64_t min = std::numeric_limits<int64_t>::min(),
                   int64_t max = std::numeric_limits<int64_t>::max()) const {
    return HasKey(key) ? GetInt(key, min, max) : fallback;
  }
  double GetDoubleOr(std::string_view key, double fallback) const {
    return HasKey(key) ? GetDouble(key) : fallback;
  }
  bool GetBoolOr(std::string_view key, bool fallback) const {
    return HasKey(key) ? GetBool(key) : fallback;
  }
  std::string GetStringOr(std::string_view key, const std::string& fallback) const {
    return HasKey(key) ? GetString(key) : fallback;
  }

 private:
  const GgufValue& GetValue(std::string_view key) const;
  // GetValue, and that it is a list.
  const GgufValue& GetArray(std::string_view key) const;
  void CheckReadable(const std::string& name, const GgufTensor& tensor) const;

  std::string path_;
  int version_ = 0;
  std::shared_ptr<const void> mapping_;
  std::map<std::string, GgufTensor, std::less<>> tensors_;
  std::map<std::string, GgufValue, std::less<>> metadata_;
};

// --- Writing

/// A value with the kind of its C++ type.
using GgufData = std::variant<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, float, bool,
                              std::string, uint64_t, int64_t, double, std::vector<std::string>,
                              std::vector<int32_t>, std::vector<uint32_t>, std::vector<float>>;

struct GgufTensorToWrite {
  std::string name;
  GgufType type = GgufType::kF32;  ///< F32, F16 or Q8_0
  std::vector<int64_t> shape;      ///< rows first
  /// Fills `out` with the elements from `begin` on, whole rows. Called once per range, in order.
  std::function<void(int64_t begin, std::span<float> out)> read;
};

/// Version 3, data aligned to 32, keys and tensors in the given order. Atomic: `path` (io/atomic.h)
/// appears whole or stays as it was. Memory: a few rows. Keys and names must differ and not be
/// empty, names be shorter than 64 bytes, dims be 1 to 4 in number with whole blocks a row (CHECK).
/// Error("io.gguf") for a tensor with values that its type cannot hold (QuantizeGguf);
/// Error("io.write") with errno's text.
void WriteGguf(const std::string& path,
               const std::vector<std::pair<std::string, GgufData>>& metadata,
               const std::vector<GgufTensorToWrite>& tensors);

}  // namespace detour::io
