// The weights of a Hugging Face directory: one safetensors file, or shards with an index.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "io/safetensors.h"

namespace detour::io {

/// All tensors of DIR/model.safetensors or, where that is missing, of the shards that
/// DIR/model.safetensors.index.json lists. Checked at Open: the index names plain files of DIR, and
/// index and shards agree tensor by tensor (none missing, none extra, none twice). Errors:
/// Error("io.safetensors"). Thread-safe after Open.
class ShardedTensors {
 public:
  static ShardedTensors Open(const std::string& directory);

  bool Has(const std::string& name) const { return file_of_.count(name) != 0; }
  /// The five of SafetensorsFile; Error if absent.
  const TensorInfo& Get(const std::string& name) const { return FileOf(name).Get(name); }
  std::vector<float> ReadF32(const std::string& name, std::span<const int64_t> shape = {}) const {
    return FileOf(name).ReadF32(name, shape);
  }
  void ReadF32Into(const std::string& name, std::span<float> out) const {
    FileOf(name).ReadF32Into(name, out);
  }
  std::span<const float> ViewF32(const std::string& name) const {
    return FileOf(name).ViewF32(name);
  }
  std::vector<int32_t> ReadI32(const std::string& name) const { return FileOf(name).ReadI32(name); }

  std::vector<std::string> Names() const;  ///< sorted
  /// The file that holds `name`, its path for messages; Error if absent.
  const SafetensorsFile& FileOf(const std::string& name) const;
  const std::vector<SafetensorsFile>& files() const { return files_; }

 private:
  std::string directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, size_t> file_of_;  // index into files_
};

}  // namespace detour::io
