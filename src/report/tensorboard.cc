#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <filesystem>

#include "core/error.h"
#include "report/metrics.h"

namespace detour::report {
namespace {

constexpr std::array<uint32_t, 256> MakeCrcTable() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0u);
    table[i] = crc;
  }
  return table;
}
constexpr auto kCrcTable = MakeCrcTable();

template <typename T>
std::string LittleEndian(T value) {
  std::string bytes(sizeof(T), '\0');
  for (size_t i = 0; i < sizeof(T); ++i) bytes[i] = static_cast<char>(value >> (8 * i));
  return bytes;
}

// Protocol-buffer fields: (field number << 3 | wire type), then the value.
std::string Varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
  return bytes + static_cast<char>(value);
}
std::string IntField(int field, int64_t value) {
  return Varint(field << 3 | 0) + Varint(static_cast<uint64_t>(value));
}
std::string DoubleField(int field, double value) {
  return Varint(field << 3 | 1) + LittleEndian(std::bit_cast<uint64_t>(value));
}
std::string FloatField(int field, float value) {
  return Varint(field << 3 | 5) + LittleEndian(std::bit_cast<uint32_t>(value));
}
std::string BytesField(int field, std::string_view value) {
  return Varint(field << 3 | 2) + Varint(value.size()) + std::string(value);
}

// Field numbers: tensorboard/compat/proto/{event,summary,tensor}.proto.
constexpr int kEventWallTime = 1, kEventStep = 2, kEventFileVersion = 3, kEventSummary = 5,
              kEventSessionLog = 7;
constexpr int kSummaryValue = 1, kValueTag = 1, kValueSimple = 2, kValueTensor = 8,
              kValueMetadata = 9;

std::string ScalarValue(std::string_view tag, double value) {
  return BytesField(kSummaryValue, BytesField(kValueTag, tag) +
                                       FloatField(kValueSimple, static_cast<float>(value)));
}

uint32_t MaskedCrc(std::string_view bytes) {
  const uint32_t crc = Crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xA282EAD8u;
}

/// TensorBoard reads a folder's files in the order of their names, so a resumed run's must sort
/// last.
int64_t NextTimestamp(const std::filesystem::path& directory) {
  constexpr std::string_view kPrefix = "events.out.tfevents.";
  int64_t next = std::chrono::duration_cast<std::chrono::seconds>(
                     std::chrono::system_clock::now().time_since_epoch())
                     .count();
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    int64_t stamp = 0;
    if (name.starts_with(kPrefix) &&
        std::from_chars(name.data() + kPrefix.size(), name.data() + name.size(), stamp).ec ==
            std::errc()) {
      next = std::max(next, stamp + 1);
    }
  }
  return next;
}

}  // namespace

uint32_t Crc32c(std::string_view bytes, uint32_t seed) {
  uint32_t crc = ~seed;
  for (const char c : bytes) crc = crc >> 8 ^ kCrcTable[(crc ^ static_cast<uint8_t>(c)) & 0xFF];
  return ~crc;
}

TensorBoardWriter::TensorBoardWriter(const std::string& directory, int64_t resume_step) {
  try {
    std::filesystem::create_directories(directory);
    path_ = fmt::format("{}/events.out.tfevents.{:010}.detour.{}", directory,
                        NextTimestamp(directory), getpid());
  } catch (const std::filesystem::filesystem_error& e) {
    Fail("report.tensorboard", "{}: {}", directory, e.code().message());
  }
  file_.reset(std::fopen(path_.c_str(), "wb"));
  if (!file_) Fail("report.tensorboard", "{}: {}", path_, std::strerror(errno));
  WriteEvent(BytesField(kEventFileVersion, "brain.Event:2"));
  if (resume_step >= 0) {
    constexpr int kStatus = 1, kStart = 1;  // SessionLog.status = START: forget all steps from here
    WriteEvent(IntField(kEventStep, resume_step + 1) +
               BytesField(kEventSessionLog, IntField(kStatus, kStart)));
  }
}

void TensorBoardWriter::WriteEvent(std::string_view body) {
  const double wall_time =
      std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  const std::string event = DoubleField(kEventWallTime, wall_time) + std::string(body);
  const std::string length = LittleEndian(static_cast<uint64_t>(event.size()));
  const std::string record =
      length + LittleEndian(MaskedCrc(length)) + event + LittleEndian(MaskedCrc(event));
  if (std::fwrite(record.data(), 1, record.size(), file_.get()) != record.size() ||
      std::fflush(file_.get()) != 0) {
    Fail("report.tensorboard", "{}: write failed: {}", path_, std::strerror(errno));
  }
}

void TensorBoardWriter::Scalar(int64_t step, std::string_view tag, double value) {
  WriteEvent(IntField(kEventStep, step) + BytesField(kEventSummary, ScalarValue(tag, value)));
}

void TensorBoardWriter::Scalars(int64_t step,
                                std::span<const std::pair<std::string, double>> values) {
  std::string summary;
  for (const auto& [tag, value] : values) summary += ScalarValue(tag, value);
  WriteEvent(IntField(kEventStep, step) + BytesField(kEventSummary, summary));
}

void TensorBoardWriter::Text(int64_t step, std::string_view tag, std::string_view markdown) {
  constexpr int kDtype = 1, kShape = 2, kStringVal = 8, kDtString = 7;
  constexpr int kDim = 2, kSize = 1, kPluginData = 1, kPluginName = 1;
  const std::string shape = BytesField(kDim, IntField(kSize, 1));
  const std::string tensor =
      IntField(kDtype, kDtString) + BytesField(kShape, shape) + BytesField(kStringVal, markdown);
  const std::string metadata = BytesField(kPluginData, BytesField(kPluginName, "text"));
  // The Text tab looks for "/text_summary", the suffix that TensorFlow's own summary op appends.
  const std::string value = BytesField(kValueTag, std::string(tag) + "/text_summary") +
                            BytesField(kValueTensor, tensor) + BytesField(kValueMetadata, metadata);
  WriteEvent(IntField(kEventStep, step) +
             BytesField(kEventSummary, BytesField(kSummaryValue, value)));
}

}  // namespace detour::report
