// The training log: metrics.jsonl for programs, TensorBoard event files for people.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace detour::report {

namespace internal {
struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
}  // namespace internal
using FileHandle = std::unique_ptr<std::FILE, internal::CloseFile>;

/// One JSON object per line, `{"step":N,…}`, each line flushed to the system as it is written.
/// Steps must not decrease, and a checkpoint of step N must be saved after all records of step N:
/// then a resumed run's file equals that of a run that never stopped. Movable; not thread-safe.
class MetricsLog {
 public:
  /// resume_step < 0 starts an empty file. Otherwise keeps what is there up to the last record with
  /// step <= resume_step and cuts off the rest, as well as a last line torn by a kill. A missing
  /// file is created. Error("report.metrics") if the file can't be opened or an earlier line is no
  /// JSON object.
  static MetricsLog Open(const std::string& path, int64_t resume_step = -1);

  /// Appends `{"step":step, …fields}` in the order of `fields`, an object without "step". Numbers
  /// that are not finite become null. Error("report.metrics") on a failed write.
  void Write(int64_t step, const nlohmann::ordered_json& fields);
  /// fsync; called before a checkpoint becomes visible, so that the log is never behind it.
  void Sync();

 private:
  MetricsLog(FileHandle file, std::string path) : file_(std::move(file)), path_(std::move(path)) {}
  FileHandle file_;
  std::string path_;
};

/// Writes one `events.out.tfevents.…` file: TFRecord framing, hand-encoded Event protocol buffers.
/// Every event is flushed. Movable; not thread-safe. Read back by the tensorboard package in
/// tests/tensorboard_oracle.py.
class TensorBoardWriter {
 public:
  /// Creates `directory` and in it a new file whose name sorts after those already there. With
  /// resume_step >= 0 readers are told to forget the steps > resume_step of earlier files.
  /// Error("report.tensorboard") if it can't be written.
  explicit TensorBoardWriter(const std::string& directory, int64_t resume_step = -1);

  void Scalar(int64_t step, std::string_view tag, double value);
  /// Several scalars of one step in one event.
  void Scalars(int64_t step, std::span<const std::pair<std::string, double>> values);
  /// Markdown, shown in the Text tab.
  void Text(int64_t step, std::string_view tag, std::string_view markdown);
  const std::string& path() const { return path_; }

 private:
  void WriteEvent(std::string_view body);
  FileHandle file_;
  std::string path_;
};

/// CRC-32C (Castagnoli, reflected 0x82F63B78) as in RFC 3720; `seed` continues an earlier call's
/// result.
uint32_t Crc32c(std::string_view bytes, uint32_t seed = 0);

}  // namespace detour::report
