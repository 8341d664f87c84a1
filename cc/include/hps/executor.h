// Executor: where CPU work of a lookup runs. The host supplies it (TensorFlow its own pool); the library has one of its
// own for hosts that have none.

#ifndef HPS_EXECUTOR_H_
#define HPS_EXECUTOR_H_

#include <cstddef>
#include <functional>
#include <memory>

namespace hps {

class Executor {
 public:
  virtual ~Executor() = default;
  // How many pieces of work run at the same time at best, the caller's thread included; at least 1.
  virtual int parallelism() const = 0;
  // Calls body(first, last) over disjoint ranges that cover [0, count), each at least `grain` long but the last;
  // returns when all are done. Work of at most `grain` runs inline. body must not call ParallelFor of the same executor
  // unless that executor says that it bears nested calls. It should not throw; pools of ours then run the other pieces
  // and throw that (std::bad_alloc, mostly) to the caller.
  virtual void ParallelFor(size_t count, size_t grain, const std::function<void(size_t, size_t)>& body) = 0;
};

// Runs everything inline.
Executor& InlineExecutor();
// A pool of `threads` - 1 threads plus the caller. Bears nested calls. Throws std::system_error where the system
// refuses threads.
std::unique_ptr<Executor> NewThreadPool(int threads);
// The same, of threads that use at most half of the processors and stand back for others there (the caller's thread
// stays as it is).
std::unique_ptr<Executor> NewBackgroundPool(int threads);

}  // namespace hps

#endif  // HPS_EXECUTOR_H_
