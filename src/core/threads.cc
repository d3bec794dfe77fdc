#include "core/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/error.h"

namespace detour {
namespace {

thread_local bool in_parallel = false;

/// Waits a moment for something that comes soon, awake: waking a thread costs more than most of
/// what it is woken for. But whoever finds that others took its core while it waited sleeps at once
/// for some time: on a machine that is shared, waiting awake only takes from the one waited for.
class Patience {
 public:
  /// Whether `ready()` came true.
  template <class Ready>
  bool Await(const Ready& ready) {
    if (rest_ > 0) {
      --rest_;
      return ready();
    }
    const auto start = std::chrono::steady_clock::now();
    for (auto last = start; last - start < kSpin;) {
      for (int i = 0; i < kPolls; ++i) {
        if (ready()) return true;
        __builtin_ia32_pause();
      }
      const auto now = std::chrono::steady_clock::now();
      if (now - last > kTaken) {
        rest_ = kRest;
        return ready();
      }
      last = now;
    }
    return false;
  }

 private:
  static constexpr std::chrono::microseconds kSpin{100}, kTaken{400};
  static constexpr int kPolls = 16, kRest = 2048;
  int rest_ = 0;  // waits that will be asleep
};

// One job at a time, of which whoever comes takes the next task. A ticket holds how many there are
// and the next of them, in one number: a worker that comes late takes nothing, or a task of the
// next job.
class Pool {
 public:
  explicit Pool(int num_workers) {
    for (int i = 0; i < num_workers; ++i) {
      workers_.emplace_back([this] { Work(); });
    }
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void Run(int64_t num_tasks, const std::function<void(int64_t)>& task) {
    std::lock_guard serial(run_mutex_);
    task_ = &task;
    error_ = nullptr;
    left_ = num_tasks;
    ticket_ = static_cast<uint64_t>(num_tasks) << 32;
    if (num_asleep_ > 0) {
      std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
    while (RunOne()) {
    }
    const auto done = [this] { return left_ == 0; };
    if (!caller_.Await(done)) {
      std::unique_lock lock(mutex_);
      caller_asleep_ = true;
      done_.wait(lock, done);
      caller_asleep_ = false;
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static bool HasTask(uint64_t ticket) { return static_cast<uint32_t>(ticket) < ticket >> 32; }

  /// Takes one task, if there is one left.
  bool RunOne() {
    if (!HasTask(ticket_)) return false;
    const uint64_t ticket = ticket_.fetch_add(1);
    if (!HasTask(ticket)) return false;
    // Its job is not over before this task is: task_ and error_ are that job's.
    in_parallel = true;
    try {
      (*task_)(static_cast<uint32_t>(ticket));
    } catch (...) {
      std::lock_guard lock(mutex_);
      error_ = std::current_exception();
    }
    in_parallel = false;
    if (left_.fetch_sub(1) == 1 && caller_asleep_) {
      std::lock_guard lock(mutex_);
      done_.notify_one();
    }
    return true;
  }

  void Work() {
    Patience patience;
    const auto called = [this] { return HasTask(ticket_) || stop_; };
    while (!stop_) {
      if (RunOne() || patience.Await(called)) continue;
      std::unique_lock lock(mutex_);
      ++num_asleep_;
      wake_.wait(lock, called);
      --num_asleep_;
    }
  }

  std::mutex run_mutex_;  // one Run at a time
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* task_ = nullptr;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> left_{0};  // tasks that are not done
  std::atomic<int> num_asleep_{0};
  std::atomic<bool> caller_asleep_{false}, stop_{false};
  Patience caller_;
  std::exception_ptr error_;
};

std::atomic<int> num_threads{0};
std::unique_ptr<Pool> pool;
std::mutex pool_mutex;
ParallelBackend backend{nullptr, nullptr};

void PoolParallelFor(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) {
  const int64_t n = end - begin;
  // More than one a thread: who comes late, or is slowed down, takes fewer.
  constexpr int64_t kPerThread = 4;
  const int64_t num_chunks =
      std::min(kPerThread * NumThreads(), (n + grain - 1) / std::max<int64_t>(grain, 1));
  {
    std::lock_guard lock(pool_mutex);
    if (!pool) pool = std::make_unique<Pool>(NumThreads() - 1);
  }
  pool->Run(num_chunks,
            [&](int64_t i) { fn(begin + n * i / num_chunks, begin + n * (i + 1) / num_chunks); });
}

}  // namespace

int NumThreads() {
  // hardware_concurrency() reads a file of the system at every call.
  static const int hardware = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const int n = num_threads.load();
  return n > 0 ? n : hardware;
}

void SetNumThreads(int n) {
  DETOUR_CHECK(n >= 1, "n = {}", n);
  num_threads = n;
  if (backend.set_num_threads) backend.set_num_threads(n);
  std::lock_guard lock(pool_mutex);
  pool.reset();
}

void SetParallelBackend(ParallelBackend b) { backend = b; }

void ParallelFor(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) {
  if (begin >= end) return;
  if (in_parallel || end - begin <= grain || NumThreads() == 1) {
    fn(begin, end);
  } else if (backend.parallel_for) {
    backend.parallel_for(begin, end, grain, fn);
  } else {
    PoolParallelFor(begin, end, grain, fn);
  }
}

}  // namespace detour
