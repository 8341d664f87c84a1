#include "cc/base/fork_guard.h"

#include <pthread.h>

#include <atomic>

namespace hps {
namespace {

std::atomic<uint64_t> generation{0};

// Registered when the library is loaded, so that no fork is missed.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

uint64_t ForkGeneration() { return generation.load(std::memory_order_relaxed); }

Status CheckNotForked(uint64_t opened) {
  if (opened == ForkGeneration()) return OkStatus();
  return FailedPrecondition(
      "this parameter server was opened before fork() and cannot be used in the child process; start workers with the "
      "'spawn' method (multiprocessing.get_context(\"spawn\")) or open the server in the child alone");
}

}  // namespace hps
