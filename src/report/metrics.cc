#include "report/metrics.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "core/error.h"
#include "core/json.h"

namespace detour::report {
namespace {

/// Bytes to keep: up to the first record with step > resume_step, or to a torn last line.
int64_t KeptBytes(const std::string& path, int64_t resume_step) {
  std::ifstream in(path, std::ios::binary);
  std::string line;
  int64_t kept_bytes = 0;
  for (int64_t number = 1; std::getline(in, line); ++number) {
    // getline meets the end of the file only on a line without its newline.
    if (in.eof()) break;
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!record.is_object()) {
      if (in.peek() == std::ifstream::traits_type::eof()) break;
      Fail("report.metrics",
           "{}: line {}: expected a JSON object, got {}. Hint: move the file away", path, number,
           line);
    }
    const auto step = record.find("step");
    if (step != record.end() && step->is_number() && step->get<int64_t>() > resume_step) break;
    kept_bytes += static_cast<int64_t>(line.size()) + 1;
  }
  return kept_bytes;
}

}  // namespace

MetricsLog MetricsLog::Open(const std::string& path, int64_t resume_step) {
  const int64_t kept_bytes = resume_step < 0 ? 0 : KeptBytes(path, resume_step);
  FileHandle file(std::fopen(path.c_str(), "ab"));
  if (!file || ftruncate(fileno(file.get()), kept_bytes) != 0) {
    Fail("report.metrics", "{}: can't be opened for writing: {}", path, std::strerror(errno));
  }
  return MetricsLog(std::move(file), path);
}

void MetricsLog::Write(int64_t step, const nlohmann::ordered_json& fields) {
  DETOUR_CHECK(fields.is_object() && !fields.contains("step"), "{}", fields.dump());
  nlohmann::ordered_json record;
  record["step"] = step;
  record.update(fields);
  // Text that is not UTF-8 (a sample cut in a character) must not stop a training run.
  const std::string line =
      record.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + '\n';
  if (std::fwrite(line.data(), 1, line.size(), file_.get()) != line.size() ||
      std::fflush(file_.get()) != 0) {
    Fail("report.metrics", "{}: write failed: {}", path_, std::strerror(errno));
  }
}

void MetricsLog::Sync() {
  if (fsync(fileno(file_.get())) != 0 && errno != EINVAL) {  // EINVAL: a pipe or /dev/null
    Fail("report.metrics", "{}: fsync failed: {}", path_, std::strerror(errno));
  }
}

}  // namespace detour::report
