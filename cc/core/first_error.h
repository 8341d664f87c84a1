// FirstError: collects the first error of parallel work.

#ifndef HPS_CORE_FIRST_ERROR_H_
#define HPS_CORE_FIRST_ERROR_H_

#include <atomic>
#include <mutex>
#include <utility>

#include "hps/status.h"

namespace hps {

// Thread-safe. Set() may be called by any worker; status() after all of them have ended.
class FirstError {
 public:
  void Set(Status status) {
    if (status.ok()) return;
    std::lock_guard lock(mutex_);
    if (status_.ok()) status_ = std::move(status);
    failed_.store(true, std::memory_order_release);
  }
  // Forgets the error. With no worker running.
  void Reset() {
    std::lock_guard lock(mutex_);
    status_ = Status();
    failed_.store(false, std::memory_order_release);
  }
  bool failed() const { return failed_.load(std::memory_order_acquire); }
  Status status() const {
    std::lock_guard lock(mutex_);
    return status_;
  }

 private:
  mutable std::mutex mutex_;
  Status status_;
  std::atomic<bool> failed_{false};
};

}  // namespace hps

#endif  // HPS_CORE_FIRST_ERROR_H_
