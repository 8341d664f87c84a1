// HashMapIndex: the open-addressing array of one partition, from keys to row slots; its size never changes.
//
// The probing is that of hash_buckets.h; this adds the memory and the count of claimed ways.
//
// A key keeps its way when it is erased. When the array is full of such keys, either the array is replaced and leaves
// them behind, or, in bounded tables, which evict all the time, Reclaim hands the ways on to other keys.
//
// Thread safety: one writer at a time (the partition's mutex); any number of readers beside it, under an EpochGuard,
// which neither lock nor wait.

#ifndef HPS_STORAGE_HASH_MAP_INDEX_H_
#define HPS_STORAGE_HASH_MAP_INDEX_H_

#include <algorithm>
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

  // Ways that no new key may take, out of those the array should have before it is rebuilt.
  uint64_t claimed() const { return claimed_; }
  uint64_t claim_limit() const { return memory_ == nullptr ? 0 : ClaimLimit(num_buckets()); }
  uint64_t memory_bytes() const { return memory_ == nullptr ? 0 : num_buckets() * sizeof(Bucket); }

  // Puts the row of `slot` (already written) in place.
  void Publish(const Way& way, Key key, uint32_t slot) {
    if (way.takes_new_key()) ++claimed_;
    SetRow(way, key, slot);
  }
  Way WayAt(uint64_t bucket, size_t number) const {
    return {buckets_ + bucket, number, Load(buckets_[bucket].entries[number])};
  }

  // Makes the ways of erased keys reusable, and takes its mark from buckets that no key had to pass. REQUIRES: no
  // reader is left that began before the last of them was erased. home_of(key) is the number of a key's home bucket.
  template <typename HomeOf>
  void Reclaim(HomeOf home_of);

 private:
  uint64_t claimed_ = 0;
  const std::shared_ptr<const AnonymousMemory> memory_;
};

template <typename HomeOf>
void HashMapIndex::Reclaim(HomeOf home_of) {
  // Positions go on beyond the end of the array, where chains wrap around. A key that lies behind position p and
  // belongs at p or before must find p marked; behind a bucket without a mark there is none. So begin at such a bucket.
  const uint64_t n = num_buckets_;
  uint64_t end = n;
  while (end < 2 * n && (Load(buckets_[end - n].marks) & kOverflowed) != 0) ++end;
  uint64_t lowest_home = UINT64_MAX;  // of the keys behind the position
  for (uint64_t position = end + 1; position-- > 0;) {
    const uint64_t number = position % n;
    Bucket& bucket = buckets_[number];
    if (position < n) {
      const uint32_t marks = Load(bucket.marks);
      if ((marks & kOverflowed) != 0 && lowest_home > position) {
        Store(bucket.marks, marks & ~kOverflowed, std::memory_order_relaxed);
      }
      for (uint32_t& entry : bucket.entries) {
        if (Load(entry) != kErased) continue;
        Store(entry, kReusable, std::memory_order_release);
        --claimed_;
      }
    }
    if ((Load(buckets_[(number + n - 1) % n].marks) & kOverflowed) == 0) continue;  // all its keys are at home
    for (size_t way = 0; way < kWays; ++way) {
      if (!HasRow(Load(bucket.entries[way]))) continue;
      const uint64_t passed = (number + n - home_of(Load(bucket.keys[way]))) % n;
      lowest_home = std::min(lowest_home, position > passed ? position - passed : 0);
    }
  }
}

}  // namespace hps

#endif  // HPS_STORAGE_HASH_MAP_INDEX_H_
