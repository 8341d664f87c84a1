// SharedWork: one ParallelFor whose pieces are taken by its caller and by helpers, whoever comes first.
//
// The caller works too and waits only for pieces that somebody is running, so a pool of busy threads cannot delay it
// for long, and nested calls cannot deadlock. Helpers keep the object alive, for one may come when all is done.

#ifndef HPS_BASE_SHARED_WORK_H_
#define HPS_BASE_SHARED_WORK_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>

namespace hps {

class SharedWork {
 public:
  // Pieces of at least `grain`, and at most four for each of `workers` threads (the caller included): that evens out
  // unequal work without much overhead. *body must live until Finish has returned.
  SharedWork(size_t count, size_t grain, size_t workers, const std::function<void(size_t, size_t)>* body)
      : count_(count), piece_(std::max({grain, Quotient(count, workers * 4), size_t{1}})), body_(body) {}

  size_t pieces() const { return Quotient(count_, piece_); }

  // Runs pieces until none is left to take. By any number of threads.
  void Work() {
    for (;;) {
      const size_t first = next_.fetch_add(piece_, std::memory_order_relaxed);
      if (first >= count_) return;
      const size_t last = std::min(count_, first + piece_);
      try {
        (*body_)(first, last);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!thrown_) thrown_ = std::current_exception();
      }
      if (done_.fetch_add(last - first, std::memory_order_acq_rel) + (last - first) == count_) {
        std::lock_guard lock(mutex_);
        finished_.notify_all();
      }
    }
  }

  // Waits until all pieces are done, then throws what one of them has thrown. By the caller, after its own Work.
  void Finish() {
    if (done_.load(std::memory_order_acquire) != count_) {
      std::unique_lock lock(mutex_);
      finished_.wait(lock, [this] { return done_.load(std::memory_order_acquire) == count_; });
    }
    if (thrown_) std::rethrow_exception(thrown_);
  }

 private:
  static size_t Quotient(size_t dividend, size_t divisor) { return dividend / divisor + (dividend % divisor != 0); }

  const size_t count_;
  const size_t piece_;
  const std::function<void(size_t, size_t)>* const body_;  // not looked at once all pieces are taken
  std::atomic<size_t> next_{0};
  std::atomic<size_t> done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
  std::exception_ptr thrown_;  // written under mutex_ before the piece counts as done
};

}  // namespace hps

#endif  // HPS_BASE_SHARED_WORK_H_
