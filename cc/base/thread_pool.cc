// Invariant: a SharedWork is kept alive by the helpers that may still look at it, not by the caller's stack.

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "cc/base/shared_work.h"
#include "cc/base/stand_back.h"
#include "hps/executor.h"

namespace hps {
namespace {

class Inline final : public Executor {
 public:
  int parallelism() const override { return 1; }
  void ParallelFor(size_t count, size_t, const std::function<void(size_t, size_t)>& body) override {
    if (count > 0) body(0, count);
  }
};

class ThreadPool final : public Executor {
 public:
  ThreadPool(int threads, bool background) {
    try {
      for (int i = 1; i < threads; ++i) {
        threads_.emplace_back([this, background] {
          if (background) StandBackForLookups();
          Run();
        });
      }
    } catch (...) {
      End();  // no destructor will
      throw;
    }
  }
  ~ThreadPool() override { End(); }
  int parallelism() const override { return static_cast<int>(threads_.size()) + 1; }

  void ParallelFor(size_t count, size_t grain, const std::function<void(size_t, size_t)>& body) override {
    if (count == 0) return;
    if (count <= grain || threads_.empty()) return body(0, count);
    auto work = std::make_shared<SharedWork>(count, grain, threads_.size() + 1, &body);
    const size_t helpers = std::min(work->pieces() - 1, threads_.size());
    {
      std::lock_guard lock(mutex_);
      for (size_t i = 0; i < helpers; ++i) queue_.push_back(work);
    }
    helpers == 1 ? wake_.notify_one() : wake_.notify_all();
    work->Work();
    {
      // Busy threads have not come to help: what is left in the queue would only be looked at in vain.
      std::lock_guard lock(mutex_);
      std::erase(queue_, work);
    }
    work->Finish();
  }

 private:
  void End() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void Run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (stopping_) return;
      std::shared_ptr<SharedWork> work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      work->Work();
      work.reset();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<SharedWork>> queue_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

Executor& InlineExecutor() {
  static Inline* executor = new Inline;
  return *executor;
}

std::unique_ptr<Executor> NewThreadPool(int threads) { return std::make_unique<ThreadPool>(threads, false); }
std::unique_ptr<Executor> NewBackgroundPool(int threads) { return std::make_unique<ThreadPool>(threads, true); }

}  // namespace hps
