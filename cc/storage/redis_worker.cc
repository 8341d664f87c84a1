// The weight of the job that runs counts as waiting until it is done.

#include "cc/storage/redis_worker.h"

namespace hps {

RedisWorker::RedisWorker(size_t capacity) : capacity_(capacity), thread_([this] { Run(); }) {}

bool RedisWorker::Add(size_t weight, std::function<void()> job, bool must) {
  {
    std::lock_guard lock(mutex_);
    if (stopping_ || (!must && weight_ + weight > capacity_)) return false;
    weight_ += weight;
    ++taken_;
    jobs_.push_back({weight, must, std::move(job)});
  }
  wake_.notify_one();
  return true;
}

bool RedisWorker::Drain(size_t most, std::chrono::steady_clock::time_point end) {
  std::unique_lock lock(mutex_);
  if (weight_ > most) return false;
  return progress_.wait_until(lock, end, [this, taken = taken_] { return finished_ >= taken; });
}

void RedisWorker::Stop() {
  std::lock_guard stop_lock(stop_mutex_);
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  if (!thread_.joinable()) return;
  thread_.join();
}

void RedisWorker::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    if (job.must || !stopping_) {
      lock.unlock();
      job.run();
      job.run = nullptr;
      lock.lock();
    }
    weight_ -= job.weight;
    ++finished_;
    progress_.notify_all();
  }
}

}  // namespace hps
