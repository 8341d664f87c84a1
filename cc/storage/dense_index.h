// DenseIndex: from the keys 0 .. n - 1 to row slots, one number of 4 bytes each.
//
// The keys of most embedding tables are 0 .. rows - 1. For those a plain array takes a quarter of the memory of a
// hashed index and a lookup touches far fewer cache lines. A table that expects n rows has one for n keys; all other
// keys are hashed. It is address space only where no such key is written.
//
// Thread safety: Find by any thread under an EpochGuard; the others by one writer at a time for each key.

#ifndef HPS_STORAGE_DENSE_INDEX_H_
#define HPS_STORAGE_DENSE_INDEX_H_

#include <atomic>
#include <cstdint>
#include <utility>

#include "cc/storage/anonymous_memory.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

class DenseIndex {
 public:
  DenseIndex() = default;  // covers no key

  static Result<DenseIndex> Create(uint64_t num_keys) {
    const size_t bytes = num_keys * sizeof(uint32_t);
    DenseIndex index;
    HPS_ASSIGN_OR_RETURN(index.memory_, AnonymousMemory::Allocate(bytes, bytes >= AnonymousMemory::kHugePageBytes));
    index.num_keys_ = num_keys;
    return index;
  }

  uint64_t num_keys() const { return num_keys_; }
  uint64_t memory_bytes() const { return num_keys_ * sizeof(uint32_t); }
  bool Covers(Key key) const { return static_cast<uint64_t>(key) < num_keys_; }
  const uint32_t* Home(Key key) const { return Place(key); }  // to be prefetched

  // REQUIRES Covers(key) from here on. The slot + 1 of the key's row, 0 if the key is absent.
  uint32_t Find(Key key) const { return std::atomic_ref<uint32_t>(*Place(key)).load(std::memory_order_acquire); }
  // Puts the row of `slot` (already written) in place.
  void Publish(Key key, uint32_t slot) {
    std::atomic_ref<uint32_t>(*Place(key)).store(slot + 1, std::memory_order_release);
  }
  void Erase(Key key) { std::atomic_ref<uint32_t>(*Place(key)).store(0, std::memory_order_release); }

 private:
  uint32_t* Place(Key key) const { return reinterpret_cast<uint32_t*>(memory_.data()) + key; }

  AnonymousMemory memory_;
  uint64_t num_keys_ = 0;
};

}  // namespace hps

#endif  // HPS_STORAGE_DENSE_INDEX_H_
