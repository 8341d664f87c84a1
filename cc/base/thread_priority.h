// Thread priority: work that is not urgent stands back for lookups.

#ifndef HPS_BASE_THREAD_PRIORITY_H_
#define HPS_BASE_THREAD_PRIORITY_H_

namespace hps {

// From now on the calling thread gets about a tenth of the processor time of others where all want it, and does not
// interrupt them when it wakes up. Call it once in a thread; it cannot be taken back. Where the host forbids it nothing
// changes.
void LowerThreadPriority();

}  // namespace hps

#endif  // HPS_BASE_THREAD_PRIORITY_H_
