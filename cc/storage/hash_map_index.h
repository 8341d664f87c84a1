// HashMapIndex: the open-addressing array of one partition, from keys to row slots; its size never changes.
//
// The probing is that of hash_buckets.h; this adds the memory and the count of claimed ways.
//
// Thread safety: one writer at a time (the partition's mutex); any number of readers beside it, under an EpochGuard,
// which neither lock nor wait.

#ifndef HPS_STORAGE_HASH_MAP_INDEX_H_
#define HPS_STORAGE_HASH_MAP_INDEX_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cc/storage/anonymous_memory.h"
#include "cc/storage/hash_buckets.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

class HashMapIndex : public HashBuckets {
 public:
  // An array without rows or room: what a partition has before its first row.
  HashMapIndex();
  // An array in part of a zeroed block, num_buckets >= 2.
  HashMapIndex(std::shared_ptr<const AnonymousMemory> memory, Bucket* buckets, uint64_t num_buckets)
      : HashBuckets(buckets, num_buckets), memory_(std::move(memory)) {}
  // `count` arrays in one zeroed block, which is freed with the last of them.
  static Result<std::vector<std::shared_ptr<HashMapIndex>>> Create(uint64_t num_buckets, size_t count);

  // The writer -------------------------------------------------------------------------------------------------------

  // Entries that are not kUnclaimed, out of those the array should take before it is rebuilt.
  uint64_t claimed() const { return claimed_; }
  uint64_t claim_limit() const { return memory_ == nullptr ? 0 : ClaimLimit(num_buckets()); }
  uint64_t memory_bytes() const { return memory_ == nullptr ? 0 : num_buckets() * sizeof(Bucket); }

  // Puts the row of `slot` (already written) in place.
  void Publish(const Way& way, Key key, uint32_t slot) {
    if (way.entry == kUnclaimed) ++claimed_;
    SetRow(way, key, slot);
  }

 private:
  uint64_t claimed_ = 0;
  const std::shared_ptr<const AnonymousMemory> memory_;
};

}  // namespace hps

#endif  // HPS_STORAGE_HASH_MAP_INDEX_H_
