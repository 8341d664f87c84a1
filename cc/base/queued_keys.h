// QueuedKeys: which keys of which tables wait in a queue, so that they are not queued again.
//
// A key is known by a mark of 64 bits in one of 65,536 places. A key whose place was taken over may be queued twice,
// and one whose mark is another's is not queued: for work that may be left undone or done twice.
//
// Thread safety: yes.

#ifndef HPS_BASE_QUEUED_KEYS_H_
#define HPS_BASE_QUEUED_KEYS_H_

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "cc/base/hash.h"
#include "hps/table_store.h"

namespace hps {

class QueuedKeys {
 public:
  // Notes the keys that are not there yet, and calls fresh(i) for each of those, in order. Returns how many there were
  // already. `table`: any address that stands for the table.
  template <typename Fresh>
  size_t Add(const void* table, std::span<const Key> keys, Fresh&& fresh) {
    std::lock_guard lock(mutex_);
    size_t repeated = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      const uint64_t mark = Mark(table, keys[i]);
      uint64_t& place = PlaceOf(mark);
      if (place == mark) {
        ++repeated;
        continue;
      }
      place = mark;
      fresh(i);
    }
    return repeated;
  }

  void Remove(const void* table, std::span<const Key> keys) {
    std::lock_guard lock(mutex_);
    for (const Key key : keys) {
      const uint64_t mark = Mark(table, key);
      uint64_t& place = PlaceOf(mark);
      if (place == mark) place = 0;
    }
  }

 private:
  static constexpr size_t kPlaces = size_t{1} << 16;

  // Never 0.
  static uint64_t Mark(const void* table, Key key) {
    return SlotHash(static_cast<uint64_t>(key) ^ SlotHash(reinterpret_cast<uintptr_t>(table))) | 1;
  }
  uint64_t& PlaceOf(uint64_t mark) { return places_[mark / 2 % kPlaces]; }

  std::mutex mutex_;
  std::vector<uint64_t> places_ = std::vector<uint64_t>(kPlaces);
};

}  // namespace hps

#endif  // HPS_BASE_QUEUED_KEYS_H_
