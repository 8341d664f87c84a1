// Fork guard: a child made by fork() has our memory but none of our threads, so nothing opened before may be used
// there, nor even destroyed: locks may be held by threads that do not exist any more.

#ifndef HPS_BASE_FORK_GUARD_H_
#define HPS_BASE_FORK_GUARD_H_

#include <atomic>
#include <cstdint>

#include "hps/status.h"

namespace hps {

// Number of forks between the process that loaded the library and this one. Thread-safe.
uint64_t ForkGeneration();

// kFailedPrecondition, naming the cure, where `generation` was taken before a fork.
Status CheckNotForked(uint64_t generation);

// The process's only T, made at the first call and never destroyed. In a forked child it is a new one; the parent's is
// left alone. Thread-safe.
template <typename T>
T& ProcessInstance() {
  struct Current {
    uint64_t generation = ForkGeneration();
    T value;
  };
  static std::atomic<Current*> current{new Current};
  Current* seen = current.load(std::memory_order_acquire);
  while (seen->generation != ForkGeneration()) {
    auto* fresh = new Current;
    if (current.compare_exchange_strong(seen, fresh, std::memory_order_acq_rel)) return fresh->value;
    delete fresh;
  }
  return seen->value;
}

}  // namespace hps

#endif  // HPS_BASE_FORK_GUARD_H_
