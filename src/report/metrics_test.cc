#include "report/metrics.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "core/error.h"

namespace detour::report {
namespace {

namespace fs = std::filesystem;

class MetricsTest : public ::testing::Test {
 protected:
  MetricsTest() : folder_(fs::temp_directory_path() / fmt::format("detour_metrics_{}", getpid())) {
    fs::create_directories(folder_);
  }
  ~MetricsTest() override { fs::remove_all(folder_); }
  std::string Path(const std::string& name) const { return (folder_ / name).string(); }
  static std::string Read(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
  }
  static void Append(const std::string& path, std::string_view text) {
    std::ofstream(path, std::ios::binary | std::ios::app) << text;
  }
  fs::path folder_;
};

TEST_F(MetricsTest, WritesOneObjectPerLineInOrder) {
  const std::string path = Path("m.jsonl");
  auto log = MetricsLog::Open(path);
  log.Write(1, {{"loss", 2.5}, {"bad", std::nan("")}, {"layers", {0.25, 1.0}}});
  log.Write(2, {{"text", "a\nb\xff"}});
  log.Sync();
  EXPECT_EQ(Read(path),
            "{\"step\":1,\"loss\":2.5,\"bad\":null,\"layers\":[0.25,1.0]}\n"
            "{\"step\":2,\"text\":\"a\\nb\uFFFD\"}\n");
  EXPECT_THROW(log.Write(3, {{"step", 1}}), std::logic_error);
}

TEST_F(MetricsTest, ResumedFileEqualsUninterrupted) {
  const auto write = [](MetricsLog log, int from, int to) {
    for (int step = from; step <= to; ++step) {
      log.Write(step, {{"kind", "train"}, {"loss", 1.0 / step}});
      if (step % 2 == 0) log.Write(step, {{"kind", "val"}, {"loss", 1.5 / step}});
    }
  };
  write(MetricsLog::Open(Path("whole")), 1, 10);
  const std::string whole = Read(Path("whole"));
  for (const char* torn :
       {"", "{\"step\":8,\"lo", "{\"step\":6}", "{\"step\":8,\"l\n", "\n", "x\n"}) {
    SCOPED_TRACE(torn);
    write(MetricsLog::Open(Path("resumed")), 1, 7);
    Append(Path("resumed"), torn);
    write(MetricsLog::Open(Path("resumed"), 6), 7, 10);
    EXPECT_EQ(Read(Path("resumed")), whole);
  }
  // Nothing past the checkpoint: only the torn end goes.
  write(MetricsLog::Open(Path("resumed")), 1, 6);
  Append(Path("resumed"), "{\"st");
  write(MetricsLog::Open(Path("resumed"), 6), 7, 10);
  EXPECT_EQ(Read(Path("resumed")), whole);
  // A file that is not there yet.
  write(MetricsLog::Open(Path("new"), 6), 7, 7);
  EXPECT_EQ(Read(Path("new")).find("{\"step\":7"), 0);
}

TEST_F(MetricsTest, RefusesWhatIsNoLog) {
  Append(Path("m"), "hello\n{\"step\":1}\n");
  EXPECT_THROW(MetricsLog::Open(Path("m"), 5), Error);
  EXPECT_EQ(Read(Path("m")), "hello\n{\"step\":1}\n");
  EXPECT_THROW(MetricsLog::Open(Path("no/such/folder")), Error);
  EXPECT_THROW(MetricsLog::Open(folder_.string()), Error);
}

TEST_F(MetricsTest, NoSpaceIsAnError) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  // ftruncate refuses a device, which is the same promise: an Error, not silence.
  EXPECT_THROW(MetricsLog::Open("/dev/full").Write(1, {{"a", 1}}), Error);
}

TEST(Crc32c, PublishedVectors) {
  // RFC 3720, B.4; the last is the usual check value of "123456789".
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62A8AB43u);
  std::string up, down;
  for (int i = 0; i < 32; ++i) {
    up += static_cast<char>(i);
    down += static_cast<char>(31 - i);
  }
  EXPECT_EQ(Crc32c(up), 0x46DD794Eu);
  EXPECT_EQ(Crc32c(down), 0x113FDB5Cu);
  EXPECT_EQ(Crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(Crc32c("6789", Crc32c("12345")), 0xE3069283u);
  EXPECT_EQ(Crc32c(""), 0u);
}

TEST_F(MetricsTest, TensorBoardReadsItBack) {
  const std::string python = DETOUR_SOURCE_DIR "/.venv/bin/python";
  if (access(python.c_str(), X_OK) != 0) GTEST_SKIP() << python << " is absent (scripts/setup)";
  const std::string folder = Path("tb");
  {
    TensorBoardWriter writer(folder);
    for (int step = 1; step <= 20; ++step) writer.Scalar(step, "train/loss", 10.0 / step);
  }
  {
    // Resumed at 10: steps 11 to 20 of the first file must be gone for the reader.
    TensorBoardWriter writer(folder, 10);
    const std::pair<std::string, double> values[] = {{"train/loss", -1.0}, {"train/share", 0.15}};
    writer.Scalars(int64_t{1} << 40, values);
    writer.Text(12, "sample", "# größer\n\nsecond *paragraph*");
  }
  const std::string command =
      python + " " DETOUR_SOURCE_DIR "/tests/tensorboard_oracle.py " + folder;
  const int status = std::system(command.c_str());
  if (WIFEXITED(status) && WEXITSTATUS(status) == 77) GTEST_SKIP() << "no tensorboard package";
  EXPECT_EQ(status, 0) << command;
}

TEST_F(MetricsTest, TensorBoardErrors) {
  Append(Path("file"), "x");
  EXPECT_THROW(TensorBoardWriter{Path("file")}, Error);
  EXPECT_THROW(TensorBoardWriter{Path("file/below")}, Error);
}

}  // namespace
}  // namespace detour::report
