// Standing back: a load beside lookups must leave them room.

#ifndef HPS_BASE_STAND_BACK_H_
#define HPS_BASE_STAND_BACK_H_

namespace hps {

// From now on the calling thread, and threads that it starts, use at most half of the processors that it may use now
// (but at least one), and there about a tenth of the time where others want it too. So a lookup finds a processor that
// runs no load: where it does not, it may wait for a whole time slice, whatever the priorities are. Call it once in a
// thread; it cannot be taken back. Where the host forbids it nothing changes.
void StandBackForLookups();

}  // namespace hps

#endif  // HPS_BASE_STAND_BACK_H_
