// Epochs: readers announce themselves, writers free nothing that an announced reader may still see.
//
// A writer publishes a new version (release store), retires the old one with the epoch of that moment, and frees it
// when no reader that began at or before that epoch is left. Readers never wait and take no lock. One domain serves the
// whole process; guards may nest and are cheap (one store to a cache line of the thread's own).
//
// Thread safety: any thread may make guards; a guard is destroyed on the thread that made it.

#ifndef HPS_EPOCH_H_
#define HPS_EPOCH_H_

#include <cstdint>
#include <memory>

namespace hps {

class EpochGuard {
 public:
  EpochGuard();
  ~EpochGuard();
  EpochGuard(const EpochGuard&) = delete;
  EpochGuard& operator=(const EpochGuard&) = delete;

 private:
  struct EpochRecord* record_;
};

// The epoch to tag a retired object with, taken after the object was made unreachable. Moves the global epoch on.
uint64_t RetireEpoch();
// Objects tagged with an epoch below this value may be freed or reused.
uint64_t SafeEpoch();

// Keeps an object that was just made unreachable until no guard that may see it is left, then lets go of it: in this
// call if there is no such guard or it ends within 20 ms, else when a later guard ends or the next object is retired.
void RetireObject(std::shared_ptr<const void> object);

}  // namespace hps

#endif  // HPS_EPOCH_H_
