// Conversions between our types and TensorFlow's.

#ifndef HPS_OPS_TF_BRIDGE_H_
#define HPS_OPS_TF_BRIDGE_H_

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>

#include "cc/base/shared_work.h"
#include "hps/executor.h"
#include "hps/status.h"
#include "tensorflow/core/framework/cancellation.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace hps {

inline absl::Status ToTensorFlow(const Status& status) {
  auto code = [&] {
    switch (status.code()) {
      case StatusCode::kOk: return absl::StatusCode::kOk;
      case StatusCode::kInvalidArgument: return absl::StatusCode::kInvalidArgument;
      case StatusCode::kNotFound: return absl::StatusCode::kNotFound;
      case StatusCode::kAlreadyExists: return absl::StatusCode::kAlreadyExists;
      case StatusCode::kFailedPrecondition: return absl::StatusCode::kFailedPrecondition;
      case StatusCode::kOutOfRange: return absl::StatusCode::kOutOfRange;
      case StatusCode::kResourceExhausted: return absl::StatusCode::kResourceExhausted;
      case StatusCode::kUnavailable: return absl::StatusCode::kUnavailable;
      case StatusCode::kDeadlineExceeded: return absl::StatusCode::kDeadlineExceeded;
      case StatusCode::kCancelled: return absl::StatusCode::kCancelled;
      case StatusCode::kDataLoss: return absl::StatusCode::kDataLoss;
      case StatusCode::kUnimplemented: return absl::StatusCode::kUnimplemented;
      case StatusCode::kInternal: return absl::StatusCode::kInternal;
    }
    return absl::StatusCode::kUnknown;
  };
  return absl::Status(code(), status.message());
}

// Whether the step or function that an op belongs to was cancelled, as a flag for LookupOptions. Lives as long as the
// lookup.
class OpCancellation {
 public:
  explicit OpCancellation(tensorflow::OpKernelContext* context) : manager_(context->cancellation_manager()) {
    if (manager_ == nullptr) return;
    token_ = manager_->get_cancellation_token();
    registered_ = manager_->RegisterCallback(token_, [this] { cancelled_.store(true, std::memory_order_relaxed); });
    if (!registered_) cancelled_ = true;  // it was cancelled before
  }
  ~OpCancellation() {
    // Waits for the callback where it is running just now.
    if (registered_) manager_->DeregisterCallback(token_);
  }
  OpCancellation(const OpCancellation&) = delete;
  OpCancellation& operator=(const OpCancellation&) = delete;

  const std::atomic<bool>* flag() const { return manager_ != nullptr ? &cancelled_ : nullptr; }

 private:
  tensorflow::CancellationManager* const manager_;
  tensorflow::CancellationToken token_ = tensorflow::CancellationManager::kInvalidToken;
  bool registered_ = false;
  std::atomic<bool> cancelled_{false};
};

// Runs a lookup's CPU work on the calling thread and on the thread pool of the device that runs the op, together as
// many threads as the pool has. (The pool's own parallel loops leave large work to the pool alone, and their caller
// waits for its threads to wake up.) Bears nested calls.
class TensorFlowExecutor final : public Executor {
 public:
  explicit TensorFlowExecutor(tensorflow::OpKernelContext* context)
      : pool_(context->device()->tensorflow_cpu_worker_threads()->workers) {}

  int parallelism() const override { return pool_->NumThreads(); }

  void ParallelFor(size_t count, size_t grain, const std::function<void(size_t, size_t)>& body) override {
    if (count == 0) return;
    const auto threads = static_cast<size_t>(pool_->NumThreads());
    if (count <= grain || threads <= 1) return body(0, count);
    auto work = std::make_shared<SharedWork>(count, grain, threads, &body);
    const size_t helpers = std::min(work->pieces() - 1, threads - 1);
    for (size_t i = 0; i < helpers; ++i) pool_->Schedule([work] { work->Work(); });
    work->Work();
    work->Finish();
  }

 private:
  tensorflow::thread::ThreadPool* const pool_;
};

}  // namespace hps

#endif  // HPS_OPS_TF_BRIDGE_H_
