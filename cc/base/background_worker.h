// BackgroundWorker: one thread and a bounded queue for what nobody waits for: promotions, inserts into caches, notes of
// accesses, freeing.
//
// Thread safety: all methods from several threads at once, Stop and the destructor not from a job. Jobs run one after
// another, must not throw, and are destroyed before they count as done.

#ifndef HPS_BASE_BACKGROUND_WORKER_H_
#define HPS_BASE_BACKGROUND_WORKER_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace hps {

class BackgroundWorker {
 public:
  // Called once: by the thread, or by Stop with `dropped` for what was offered and had not begun.
  using Job = std::function<void(bool dropped)>;

  // Jobs of at most `capacity` weight wait or run; Offer refuses what is beyond.
  explicit BackgroundWorker(size_t capacity);
  ~BackgroundWorker() { Stop(); }

  // False: too much is waiting, or the worker was stopped. The job is not called.
  bool Offer(size_t weight, Job job) { return Add(weight, std::move(job), /*must=*/false); }
  // False: the worker was stopped. What is posted has no weight and is never dropped.
  bool Post(Job job) { return Add(0, std::move(job), /*must=*/true); }
  // Waits until all that was taken before is done or dropped.
  void Drain() { (void)Drain(SIZE_MAX, std::chrono::steady_clock::time_point::max()); }
  // False: more than `most` weight was waiting, and it did not wait; or the end came first. Not from a job.
  bool Drain(size_t most, std::chrono::steady_clock::time_point end);
  // Drops what was offered, finishes what was posted, and ends the thread. Idempotent.
  void Stop();
  bool stopped() const {
    std::lock_guard lock(mutex_);
    return stopping_;
  }

 private:
  struct Queued {
    size_t weight;
    bool must;
    Job job;
  };
  bool Add(size_t weight, Job job, bool must);
  void Call(Queued queued, bool dropped);
  void Run();

  const size_t capacity_;
  mutable std::mutex mutex_;  // guards the next five
  std::deque<Queued> jobs_;
  size_t weight_ = 0;
  uint64_t taken_ = 0;
  uint64_t finished_ = 0;  // of those taken, done or dropped
  bool stopping_ = false;
  std::condition_variable wake_;
  std::condition_variable progress_;
  std::mutex stop_mutex_;  // one Stop at a time
  std::thread thread_;
};

}  // namespace hps

#endif  // HPS_BASE_BACKGROUND_WORKER_H_
