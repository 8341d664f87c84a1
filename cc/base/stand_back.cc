#include "cc/base/stand_back.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace hps {
namespace {

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
  sched_param none{};
  (void)::sched_setscheduler(static_cast<pid_t>(thread), SCHED_BATCH, &none);
  (void)::setpriority(PRIO_PROCESS, thread, ::getpriority(PRIO_PROCESS, thread) + kSteps);
}

}  // namespace hps
