// UpdateGate: orders rows that were read from the tiers after the updates that overtook them. One a device.
//
// Invariant (embedding_cache.h says why): a row read at stamp s is launched into a cache only while the gate is held
// and UpdatedSince(key, s) is false, or is erased behind the launch in the same stream; an update notes its keys and
// lets its stream wait for all fills launched so far while the gate is held. So of a fill and an update of one key
//   the fill is launched first: the update runs behind it and overwrites the row;
//   the update is noted first: either the fill's stamp is younger, and the tiers had the new row when it read them, or
//   the fill's row is taken out again.
//
// Keys are remembered by a hash in a table of fixed size: others with the same place are taken for updated as well,
// which costs them a place in the cache, never a wrong row.
//
// Thread safety: Now() from any thread; the others while mutex() is held.

#ifndef HPS_CACHE_UPDATE_GATE_H_
#define HPS_CACHE_UPDATE_GATE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "cc/base/hash.h"
#include "cuda_kernels/device.h"
#include "hps/table_store.h"

namespace hps {

class UpdateGate {
 public:
  std::mutex& mutex() { return mutex_; }

  uint64_t Now() const { return clock_.load(std::memory_order_acquire); }

  void NoteUpdates(uint32_t cache, std::span<const Key> keys) {
    const uint64_t now = clock_.load(std::memory_order_relaxed) + 1;
    for (const Key key : keys) updated_[PlaceOf(cache, key)] = now;
    clock_.store(now, std::memory_order_release);
  }
  // Where nothing was updated since, as most of the time, no key's place is looked at: they lie far apart in memory.
  bool UpdatedSince(uint32_t cache, Key key, uint64_t stamp) const {
    return clock_.load(std::memory_order_relaxed) != stamp && updated_[PlaceOf(cache, key)] > stamp;
  }

  // `event` was recorded behind a fill. It may be recorded again later, behind work that follows the fill.
  void NoteFill(cudaEvent_t event) {
    if (std::find(fills_.begin(), fills_.end(), event) == fills_.end()) fills_.push_back(event);
  }
  // All updates run on one stream, so each fill is waited for once.
  int WaitForFills(cuda::Device& device, cudaStream_t stream) {
    for (const cudaEvent_t event : fills_) {
      if (const int error = device.WaitEvent(stream, event)) return error;
    }
    fills_.clear();
    return 0;
  }
  // Before the event is destroyed, which is after it is done.
  void ForgetFill(cudaEvent_t event) { std::erase(fills_, event); }

 private:
  static constexpr size_t kPlaces = size_t{1} << 16;
  static size_t PlaceOf(uint32_t cache, Key key) {
    return SlotHash(static_cast<uint64_t>(key) ^ SlotHash(cache)) % kPlaces;
  }

  std::mutex mutex_;
  std::atomic<uint64_t> clock_{0};
  std::vector<uint64_t> updated_ = std::vector<uint64_t>(kPlaces);
  std::vector<cudaEvent_t> fills_;
};

}  // namespace hps

#endif  // HPS_CACHE_UPDATE_GATE_H_
