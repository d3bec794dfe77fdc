#include "core/threads.h"

#include <algorithm>
#include <atomic>
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

// Workers sleep on a condition variable: they never spin, so a starved machine loses nothing to
// them.
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
    {
      std::lock_guard lock(mutex_);
      task_ = &task;
      num_tasks_ = num_tasks;
      next_ = 0;
      active_ = static_cast<int>(workers_.size());
      error_ = nullptr;
      ++generation_;
    }
    wake_.notify_all();
    Drain();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    task_ = nullptr;
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void Drain() {
    in_parallel = true;
    for (;;) {
      const int64_t i = next_.fetch_add(1);
      if (i >= num_tasks_) break;
      try {
        (*task_)(i);
      } catch (...) {
        std::lock_guard lock(mutex_);
        error_ = std::current_exception();
      }
    }
    in_parallel = false;
  }

  void Work() {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
      }
      Drain();
      std::lock_guard lock(mutex_);
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_;  // one Run at a time
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* task_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t num_tasks_ = 0;
  int active_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
};

std::atomic<int> num_threads{0};
std::unique_ptr<Pool> pool;
std::mutex pool_mutex;
ParallelBackend backend{nullptr, nullptr};

void PoolParallelFor(int64_t begin, int64_t end, int64_t grain, const RangeFn& fn) {
  const int64_t n = end - begin;
  const int64_t num_chunks =
      std::min<int64_t>(NumThreads(), (n + grain - 1) / std::max<int64_t>(grain, 1));
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
