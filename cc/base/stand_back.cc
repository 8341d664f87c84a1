#include "cc/base/stand_back.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace hps {
namespace {

// struct sched_attr of Linux, which no header of the C library declares.
struct SchedulerRequest {
  uint32_t size = sizeof(SchedulerRequest);
  uint32_t policy = 0;
  uint64_t flags = 0;
  int32_t nice = 0;
  uint32_t priority = 0;
  uint64_t slice_ns = 0;  // since Linux 6.12; before, no word of it was read
  uint64_t deadline_ns = 0;
  uint64_t period_ns = 0;
};

void UseHalfOfTheProcessors() {
  cpu_set_t allowed;
  if (::sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;  // more processors than the set can name
  int left = (CPU_COUNT(&allowed) + 1) / 2;                            // stay free
  for (int cpu = 0; cpu < CPU_SETSIZE && left > 0 && CPU_COUNT(&allowed) > 1; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    CPU_CLR(cpu, &allowed);
    --left;
  }
  (void)::sched_setaffinity(0, sizeof(allowed), &allowed);
}

}  // namespace

void StandBackForLookups() {
  UseHalfOfTheProcessors();
  constexpr int kSteps = 10;
  const auto thread = static_cast<id_t>(::syscall(SYS_gettid));  // Linux keeps the nice value per thread
  SchedulerRequest request;
  request.policy = SCHED_BATCH;
  request.nice = std::min(::getpriority(PRIO_PROCESS, thread) + kSteps, 19);
  request.slice_ns = 100'000;
  (void)::syscall(SYS_sched_setattr, 0, &request, 0);
}

}  // namespace hps
