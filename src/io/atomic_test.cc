#include "io/atomic.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <thread>

#include "core/error.h"
#include "io/posix.h"

namespace detour::io {
namespace {

namespace fs = std::filesystem;

class AtomicTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = testing::TempDir() + "detour_atomic_XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override {
    unsetenv("DETOUR_FAIL_POINT");
    fs::remove_all(dir_);
  }

  // Relative path -> content of every file below `root`; links as "-> target".
  std::map<std::string, std::string> Tree(const std::string& root) const {
    std::map<std::string, std::string> tree;
    for (const auto& entry : fs::recursive_directory_iterator(root)) {
      const std::string name = fs::relative(entry.path(), root).string();
      if (entry.is_symlink()) {
        tree[name] = "-> " + fs::read_symlink(entry.path()).string();
      } else if (entry.is_regular_file()) {
        tree[name] = ReadFile(entry.path());
      }
    }
    return tree;
  }

  std::string dir_;
};

// The message of the Error that `run` throws; empty if none.
std::string Message(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  }
  return "";
}
bool Contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Runs in a child; its status is 0 unless `run` throws or is killed.
int InChild(const std::function<void()>& run) {
  const pid_t pid = fork();
  if (pid == 0) {
    try {
      run();
    } catch (...) {
      _exit(1);
    }
    _exit(0);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return status;
}

void WriteModel(const std::string& target, const std::string& content) {
  AtomicDir dir(target);
  WriteFile(dir.path() + "/a", content);
  fs::create_directory(dir.path() + "/sub");
  std::ofstream(dir.path() + "/sub/b") << content;
  dir.Commit();
}

TEST_F(AtomicTest, ReadFile) {
  const std::string path = dir_ + "/f";
  std::string content(100'000, 'x');
  content[5] = '\0';
  WriteFile(path, content);
  EXPECT_EQ(ReadFile(path), content);
  EXPECT_EQ(ReadFile(path, 100'000), content);
  EXPECT_TRUE(Contains(Message([&] { ReadFile(path, 99'999); }), "at most 99999 bytes"));
  WriteFile(path, "");
  EXPECT_EQ(ReadFile(path), "");
  EXPECT_TRUE(Contains(Message([&] { ReadFile(dir_ + "/none"); }), "No such file"));
  EXPECT_TRUE(Contains(Message([&] { ReadFile(dir_); }), "got a directory"));
  mkfifo((dir_ + "/fifo").c_str(), 0600);
  EXPECT_TRUE(Contains(Message([&] { ReadFile(dir_ + "/fifo"); }), "got a pipe"));
  EXPECT_TRUE(Contains(Message([&] { ReadFile("/dev/zero"); }), "got a device"));
  EXPECT_FALSE(ReadFile("/proc/self/status").empty());
}

TEST_F(AtomicTest, WriteFileErrors) {
  EXPECT_TRUE(Contains(Message([&] { WriteFile(dir_, "x"); }), "Is a directory"));
  EXPECT_TRUE(Contains(Message([&] { WriteFile(dir_ + "/no/f", "x"); }), "[io.write]"));
  EXPECT_TRUE(Contains(Message([&] { WriteFile("/dev/full", "x"); }), "No space left"));
  EXPECT_TRUE(fs::exists("/dev/full"));
  for (const std::string name : {"", "/", ".", "..", "a/.."}) {
    EXPECT_NE(Message([&] { WriteFileAtomic(name, "x"); }), "") << name;
    EXPECT_NE(Message([&] { AtomicDir dir(name); }), "") << name;
  }
  EXPECT_TRUE(Contains(Message([&] { WriteFileAtomic(dir_, "x"); }), "got a directory"));
  WriteFile(dir_ + "/f", "x");
  EXPECT_TRUE(Contains(Message([&] { AtomicDir dir(dir_ + "/f"); }), "got a file"));
  EXPECT_EQ(Tree(dir_).size(), 1u);
}

TEST_F(AtomicTest, FileReplacesOrLeavesAlone) {
  const std::string path = dir_ + "/f";
  WriteFileAtomic(path, "old");
  WriteFileAtomic(path, "new");
  EXPECT_EQ(Tree(dir_), (std::map<std::string, std::string>{{"f", "new"}}));
  {
    AtomicFile file(path);
    WriteFile(file.path(), "never");
  }
  EXPECT_EQ(Tree(dir_), (std::map<std::string, std::string>{{"f", "new"}}));
}

TEST_F(AtomicTest, DirReplacesOrLeavesAlone) {
  const std::map<std::string, std::string> expected = {{"m/a", "two"}, {"m/sub/b", "two"}};
  WriteModel(dir_ + "/m", "one");
  WriteFile(dir_ + "/m/more", "");
  WriteModel(dir_ + "/m/", "two");
  EXPECT_EQ(Tree(dir_), expected);
  {
    AtomicDir dir(dir_ + "/m");
    WriteFile(dir.path() + "/a", "never");
  }
  EXPECT_EQ(Tree(dir_), expected);

  fs::create_directory_symlink("m", dir_ + "/link");
  WriteModel(dir_ + "/link", "three");
  EXPECT_TRUE(fs::is_symlink(dir_ + "/link"));
  EXPECT_EQ(ReadFile(dir_ + "/m/a"), "three");
}

TEST_F(AtomicTest, SymlinkIsReplaced) {
  ReplaceSymlink(dir_ + "/latest", "step-1");
  ReplaceSymlink(dir_ + "/latest", "step-2");
  EXPECT_EQ(Tree(dir_), (std::map<std::string, std::string>{{"latest", "-> step-2"}}));
}

// What is replaced in the two tests below, and what must be there before and after.
struct Operation {
  const char* name;
  std::function<void(const std::string& dir, const std::string& content)> run;
};
const Operation kOperations[] = {
    {"file", [](const std::string& d, const std::string& c) { WriteFileAtomic(d + "/f", c); }},
    {"dir", [](const std::string& d, const std::string& c) { WriteModel(d + "/m", c); }},
    {"link", [](const std::string& d, const std::string& c) { ReplaceSymlink(d + "/l", c); }},
};

TEST_F(AtomicTest, KilledAnywhereLeavesOldOrNew) {
  for (const Operation& operation : kOperations) {
    const std::string expected = dir_ + "/expected", work = dir_ + "/work";
    fs::create_directory(expected);
    operation.run(expected, "new");
    const auto new_tree = Tree(expected);
    fs::remove_all(expected);
    int num_kills = 0;
    for (const bool has_old : {false, true}) {
      for (const std::string kind : {"write", "fsync", "rename", "remove"}) {
        for (int n = 1;; ++n) {
          fs::create_directory(work);
          if (has_old) operation.run(work, "old");
          const auto old_tree = Tree(work);
          const int status = InChild([&] {
            setenv("DETOUR_FAIL_POINT", fmt::format("{}:{}:kill", kind, n).c_str(), 1);
            operation.run(work, "new");
          });
          CleanTemporaries(work);
          const auto tree = Tree(work);
          EXPECT_TRUE(tree == old_tree || tree == new_tree)
              << operation.name << " " << kind << ":" << n << " " << testing::PrintToString(tree);
          fs::remove_all(work);
          if (WIFEXITED(status)) {
            EXPECT_EQ(WEXITSTATUS(status), 0);
            EXPECT_EQ(tree, new_tree);
            break;
          }
          ASSERT_EQ(WTERMSIG(status), SIGKILL);
          ++num_kills;
          ASSERT_LT(n, 50);
        }
      }
    }
    EXPECT_GE(num_kills, 4) << operation.name;
  }
}

TEST_F(AtomicTest, FailureAnywhereLeavesOldOrNew) {
  const std::string work = dir_ + "/work";
  for (const Operation& operation : kOperations) {
    fs::create_directory(work);
    operation.run(work, "new");
    const auto new_tree = Tree(work);
    fs::remove_all(work);
    for (const std::string kind : {"write", "fsync", "rename"}) {
      for (int n = 1;; ++n) {
        fs::create_directory(work);
        operation.run(work, "old");
        const auto old_tree = Tree(work);
        setenv("DETOUR_FAIL_POINT", fmt::format("{}:{}", kind, n).c_str(), 1);
        const std::string message = Message([&] { operation.run(work, "new"); });
        unsetenv("DETOUR_FAIL_POINT");
        const auto tree = Tree(work);
        if (message.empty()) {
          fs::remove_all(work);
          break;
        }
        EXPECT_TRUE(Contains(message, "No space left on device")) << message;
        for (const auto& [name, content] : tree) EXPECT_FALSE(Contains(name, ".tmp-")) << name;
        CleanTemporaries(work);
        const auto cleaned = Tree(work);
        // The old directory stays aside if only the last sync of the new one failed.
        EXPECT_TRUE(cleaned == tree || (operation.name == std::string("dir") && kind == "fsync"));
        EXPECT_TRUE(cleaned == old_tree || cleaned == new_tree)
            << operation.name << " " << kind << ":" << n << " " << testing::PrintToString(cleaned);
        operation.run(work, "old");
        EXPECT_EQ(Tree(work), old_tree);
        fs::remove_all(work);
        ASSERT_LT(n, 50);
      }
    }
  }
}

TEST_F(AtomicTest, NextDirHealsWithoutClean) {
  WriteModel(dir_ + "/m", "old");
  InChild([&] {
    setenv("DETOUR_FAIL_POINT", "rename:2:kill", 1);
    WriteModel(dir_ + "/m", "new");
  });
  ASSERT_FALSE(fs::exists(dir_ + "/m"));
  { AtomicDir dir(dir_ + "/m"); }
  EXPECT_EQ(Tree(dir_), (std::map<std::string, std::string>{{"m/a", "old"}, {"m/sub/b", "old"}}));
}

TEST_F(AtomicTest, LiveTemporariesStay) {
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    AtomicDir dir(dir_ + "/m");
    if (write(ready[1], "x", 1) == 1) pause();
    _exit(1);
  }
  char byte;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  const auto num_entries = [&] {
    return std::distance(fs::directory_iterator(dir_), fs::directory_iterator());
  };
  CleanTemporaries(dir_);
  EXPECT_EQ(num_entries(), 1);
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  CleanTemporaries(dir_);
  EXPECT_EQ(num_entries(), 0);

  // Our own, and one of a dead process that had our PID.
  AtomicDir own(dir_ + "/m");
  WriteFile(fmt::format("{}/.m.tmp-{}-987654321", dir_, getpid()), "");
  WriteFile(dir_ + "/.m.tmp-x-1", "not ours");
  WriteFile(dir_ + "/.tmp-1-1", "not ours");
  EXPECT_EQ(num_entries(), 4);
  CleanTemporaries(dir_);
  EXPECT_EQ(num_entries(), 3);
  EXPECT_TRUE(fs::exists(own.path()));
  CleanTemporaries(dir_ + "/missing");
}

TEST_F(AtomicTest, FullAndReadOnlyDisk) {
  if (mount("tmpfs", dir_.c_str(), "tmpfs", 0, "size=64k") != 0) {
    GTEST_SKIP() << "mounting a tmpfs is not permitted here";
  }
  WriteFileAtomic(dir_ + "/f", "old");
  WriteModel(dir_ + "/m", "old");
  const auto before = Tree(dir_);
  const std::string large(1 << 20, 'x');
  for (const auto& run : {std::function<void()>([&] { WriteFileAtomic(dir_ + "/f", large); }),
                          std::function<void()>([&] { WriteModel(dir_ + "/m", large); })}) {
    const std::string message = Message(run);
    EXPECT_TRUE(Contains(message, "No space left on device. Hint: free some space")) << message;
    EXPECT_EQ(Tree(dir_), before);
  }
  EXPECT_EQ(Message([&] { WriteModel(dir_ + "/m", "new"); }), "");  // the space came back
  EXPECT_EQ(mount("tmpfs", dir_.c_str(), "tmpfs", MS_REMOUNT | MS_RDONLY, nullptr), 0);
  EXPECT_TRUE(Contains(Message([&] { WriteFileAtomic(dir_ + "/f", "x"); }), "Read-only file"));
  EXPECT_TRUE(Contains(Message([&] { AtomicDir dir(dir_ + "/m"); }), "Read-only file"));
  EXPECT_EQ(umount2(dir_.c_str(), MNT_DETACH), 0);
}

TEST_F(AtomicTest, NoPermission) {
  WriteFile(dir_ + "/f", "x");
  ASSERT_EQ(chmod((dir_ + "/f").c_str(), 0), 0);
  ASSERT_EQ(chmod(dir_.c_str(), 0555), 0);
  const int status = InChild([&] {
    constexpr uid_t kNobody = 65534;
    if (getuid() == 0 && (setgid(kNobody) != 0 || setuid(kNobody) != 0)) _exit(2);
    if (!Contains(Message([&] { ReadFile(dir_ + "/f"); }), "Permission denied")) _exit(3);
    if (!Contains(Message([&] { WriteFileAtomic(dir_ + "/g", "x"); }),
                  "Permission denied. Hint: choose a place you may write to")) {
      _exit(4);
    }
  });
  ASSERT_EQ(chmod(dir_.c_str(), 0755), 0);
  EXPECT_EQ(status, 0) << WEXITSTATUS(status);
}

// A pipe takes what fits: every write is short. A signal without SA_RESTART interrupts the blocked
// ones.
TEST_F(AtomicTest, ShortWritesAndSignals) {
  const std::string path = dir_ + "/fifo";
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  struct sigaction action {};
  action.sa_handler = [](int) {};
  sigaction(SIGUSR1, &action, nullptr);
  const std::string content(1 << 20, 'y');
  const pthread_t writer = pthread_self();
  size_t received = 0;
  std::thread reader([&] {
    const int fd = open(path.c_str(), O_RDONLY);
    char buffer[5000];
    for (ssize_t n; (n = read(fd, buffer, sizeof(buffer))) > 0;) {
      received += n;
      // Beyond this the writer may have finished and left.
      if (received < content.size() - 200'000) pthread_kill(writer, SIGUSR1);
      usleep(100);
    }
    close(fd);
  });
  EXPECT_EQ(Message([&] { WriteFile(path, content); }), "");
  reader.join();
  EXPECT_EQ(received, content.size());
  signal(SIGUSR1, SIG_DFL);
}

}  // namespace
}  // namespace detour::io
