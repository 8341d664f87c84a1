// Lock order: stop_mutex_, mutex_. Jobs are called and destroyed without mutex_.

#include "cc/base/background_worker.h"

namespace hps {

BackgroundWorker::BackgroundWorker(size_t capacity) : capacity_(capacity), thread_([this] { Run(); }) {}

bool BackgroundWorker::Add(size_t weight, Job job, bool must) {
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

bool BackgroundWorker::Drain(size_t most, std::chrono::steady_clock::time_point end) {
  std::unique_lock lock(mutex_);
  if (weight_ > most) return false;
  const auto done = [this, taken = taken_] { return finished_ >= taken; };
  if (end != std::chrono::steady_clock::time_point::max()) return progress_.wait_until(lock, end, done);
  progress_.wait(lock, done);
  return true;
}

void BackgroundWorker::Stop() {
  std::lock_guard stop_lock(stop_mutex_);
  std::deque<Queued> dropped;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    std::deque<Queued> kept;
    for (Queued& queued : jobs_) (queued.must ? kept : dropped).push_back(std::move(queued));
    jobs_.swap(kept);
  }
  wake_.notify_one();
  for (Queued& queued : dropped) Call(std::move(queued), /*dropped=*/true);
  if (thread_.joinable()) thread_.join();
}

void BackgroundWorker::Call(Queued queued, bool dropped) {
  queued.job(dropped);
  queued.job = nullptr;
  std::lock_guard lock(mutex_);
  weight_ -= queued.weight;
  ++finished_;
  progress_.notify_all();
}

void BackgroundWorker::Run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Queued next = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    Call(std::move(next), /*dropped=*/false);
    lock.lock();
  }
}

}  // namespace hps
