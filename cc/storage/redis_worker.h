// RedisWorker: one thread for what nobody waits for: noting accesses to rows, freeing tables that were dropped.
//
// Thread safety: all methods from several threads at once. Jobs run one after another and must not throw.

#ifndef HPS_STORAGE_REDIS_WORKER_H_
#define HPS_STORAGE_REDIS_WORKER_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace hps {

class RedisWorker {
 public:
  // Jobs of at most `capacity` weight wait; Offer drops what is beyond.
  explicit RedisWorker(size_t capacity);
  ~RedisWorker() { Stop(); }

  // False: too much is waiting, the job was dropped.
  bool Offer(size_t weight, std::function<void()> job) { return Add(weight, std::move(job), /*must=*/false); }
  // Never drops, unless the worker was stopped.
  bool Post(std::function<void()> job) { return Add(0, std::move(job), /*must=*/true); }
  // Waits until all that was taken before is done or dropped. False: more than `most` weight was waiting, and it did
  // not wait; or the end came first. Not from a job.
  bool Drain(size_t most, std::chrono::steady_clock::time_point end);
  // Finishes what was posted, drops what was offered, and ends the thread. Idempotent.
  void Stop();

 private:
  struct Job {
    size_t weight;
    bool must;
    std::function<void()> run;
  };
  bool Add(size_t weight, std::function<void()> job, bool must);
  void Run();

  const size_t capacity_;
  std::mutex mutex_;  // guards the next five
  std::deque<Job> jobs_;
  size_t weight_ = 0;
  uint64_t taken_ = 0;
  uint64_t finished_ = 0;  // of those taken, done or dropped; in their order
  bool stopping_ = false;
  std::condition_variable wake_;
  std::condition_variable progress_;
  std::mutex stop_mutex_;  // one Stop at a time
  std::thread thread_;
};

}  // namespace hps

#endif  // HPS_STORAGE_REDIS_WORKER_H_
