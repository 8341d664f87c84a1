#include "cc/base/thread_priority.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace hps {

void LowerThreadPriority() {
  constexpr int kSteps = 10;
  const auto thread = static_cast<id_t>(::syscall(SYS_gettid));  // Linux keeps the nice value per thread
  sched_param none{};
  (void)::sched_setscheduler(static_cast<pid_t>(thread), SCHED_BATCH, &none);
  (void)::setpriority(PRIO_PROCESS, thread, ::getpriority(PRIO_PROCESS, thread) + kSteps);
}

}  // namespace hps
