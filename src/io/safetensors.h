// safetensors: u64 LE header length, JSON header, data. A reader that trusts nothing, and a writer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace detour::io {

enum class DType { kF64, kF32, kF16, kBF16, kI64, kI32, kI16, kI8, kU8, kBool };
const char* DTypeName(DType dtype);  ///< as in the header: "F32", "BF16", …
int64_t DTypeBytes(DType dtype);

/// Exact but for F64, which rounds to nearest. `bytes` of F64, F32, F16 or BF16, any alignment, as
/// many as out.size() elements have (CHECK).
void ConvertToF32(std::span<const std::byte> bytes, DType dtype, std::span<float> out);
/// The same values as F32, F16 or BF16 (CHECK), rounded to nearest, ties to even; too large becomes
/// infinity, NaN stays NaN. ConvertToF32 and back is the identity on all bit patterns.
std::vector<std::byte> ConvertF32(std::span<const float> values, DType dtype);

struct TensorInfo {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  ///< into the mapped file
  int64_t NumElements() const;
};

/// A memory-mapped file, read only. Checked at Open: header length against file size (and ≤ 100
/// MB), JSON depth, offsets in range, contiguous and not overlapping, dtype × shape = bytes without
/// overflow, no duplicate names. The data may be unaligned for its type: copy, do not cast.
/// The file must not shrink while it is open (replacing it by a rename is fine).
/// Errors: Error("io.safetensors"), message with path, tensor, expected and found. Thread-safe
/// after Open.
class SafetensorsFile {
 public:
  static SafetensorsFile Open(const std::string& path);
  /// The same checks on bytes in memory that must outlive the object; `name` stands in messages.
  /// (Used by the fuzzer.)
  static SafetensorsFile Parse(std::span<const std::byte> bytes, const std::string& name);

  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool Has(const std::string& name) const { return tensors_.count(name) != 0; }
  /// Error if absent.
  const TensorInfo& Get(const std::string& name) const;
  /// Converts F32, F16, BF16 or F64 to f32 (exact but for F64). Error for another dtype or when
  /// shape differs from `shape` (an empty `shape` accepts any).
  std::vector<float> ReadF32(const std::string& name, std::span<const int64_t> shape = {}) const;
  void ReadF32Into(const std::string& name, std::span<float> out) const;
  /// The values where they lie in the mapped file, valid as long as this object; empty if they are
  /// no aligned F32, or were parsed from memory.
  std::span<const float> ViewF32(const std::string& name) const;
  std::vector<int32_t> ReadI32(const std::string& name) const;  ///< I32, or I64 if all values fit
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::shared_ptr<const void> mapping_;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

struct TensorToWrite {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
};

/// Writes to `path` (not atomic by itself: go through AtomicDir or AtomicFile), then fsync. The
/// header names the tensors in the given order and is padded with spaces to a multiple of 8; the
/// data come widest dtype first, so that every tensor is aligned for its dtype. `metadata` gets
/// {"format": "pt"} if it has no "format". Names must differ and bytes fit dtype and shape (CHECK).
/// Error("io.write") with errno's text (no space, read-only, …).
void WriteSafetensors(const std::string& path, const std::vector<TensorToWrite>& tensors,
                      std::map<std::string, std::string> metadata = {});

}  // namespace detour::io
