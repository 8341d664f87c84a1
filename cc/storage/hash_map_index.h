// HashMapIndex: the open-addressing array of one partition, from keys to row slots; its size never changes.
//
// A bucket is one cache line of five entries; a key that finds its bucket full goes to the next one. Hence 12.8 bytes
// an entry, and one cache line for most look-ups.
//
// Thread safety: one writer at a time (the partition's mutex); any number of readers beside it, under an EpochGuard,
// which neither lock nor wait.

#ifndef HPS_STORAGE_HASH_MAP_INDEX_H_
#define HPS_STORAGE_HASH_MAP_INDEX_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cc/base/hash.h"
#include "cc/storage/anonymous_memory.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

// Where a hashed key belongs: its partition, and how far into the partition's buckets (as a fraction of 2^64).
struct KeyPlace {
  uint32_t partition;
  uint64_t fraction;
};

inline KeyPlace PlaceOf(Key key, uint32_t num_partitions) {
  __extension__ using uint128 = unsigned __int128;
  const uint128 product = static_cast<uint128>(SlotHash(static_cast<uint64_t>(key))) * num_partitions;
  return {static_cast<uint32_t>(product >> 64), static_cast<uint64_t>(product)};
}

class HashMapIndex {
 public:
  static constexpr size_t kWays = 5;

  // What an entry says besides slot + 1.
  static constexpr uint32_t kUnclaimed = 0;
  static constexpr uint32_t kErased = 0xFFFFFFFF;

  struct alignas(64) Bucket {
    Key keys[kWays];
    uint32_t entries[kWays];
    uint32_t overflowed;  // 1: a key that belongs here may be in the next bucket
  };
  static_assert(sizeof(Bucket) == 64);

  // A bucket way: where a key is, or where it may be put.
  struct Way {
    Bucket* bucket = nullptr;
    size_t number = 0;
    uint32_t entry = kUnclaimed;  // kUnclaimed: the key was never in this array

    // The slot + 1 of the key's row, 0 if it has none.
    uint32_t row_entry() const { return entry == kErased ? 0 : entry; }
  };

  // Buckets for so many rows at the load the array is planned for (0.8).
  static uint64_t BucketsFor(uint64_t rows);

  // An array without rows or room: what a partition has before its first row.
  HashMapIndex();
  // An array in part of a zeroed block, num_buckets >= 2.
  HashMapIndex(std::shared_ptr<const AnonymousMemory> memory, Bucket* buckets, uint64_t num_buckets)
      : buckets_(buckets), num_buckets_(num_buckets), memory_(std::move(memory)) {}
  // `count` arrays in one zeroed block, which is freed with the last of them.
  static Result<std::vector<std::shared_ptr<HashMapIndex>>> Create(uint64_t num_buckets, size_t count);

  // Readers ----------------------------------------------------------------------------------------------------------

  Bucket* Home(uint64_t fraction) const { return buckets_ + MapToRange(fraction, num_buckets_); }

  // The slot + 1 of the key's row, 0 if the key is absent.
  uint32_t Find(Key key, const Bucket* home) const {
    const Bucket* bucket = home;
    do {
      for (uint32_t ways = WaysOf(key, *bucket); ways != 0; ways &= ways - 1) {
        const int way = __builtin_ctz(ways);
        const uint32_t entry = Load(bucket->entries[way], std::memory_order_acquire);
        // The second look at the key: an unclaimed way holds key 0, and another key may have claimed it meanwhile.
        if (entry != kUnclaimed && Load(bucket->keys[way]) == key) return entry == kErased ? 0 : entry;
      }
      if (Load(bucket->overflowed) == 0) return 0;
      bucket = Next(bucket);
    } while (bucket != home);
    return 0;
  }

  // The writer -------------------------------------------------------------------------------------------------------

  // Entries that are not kUnclaimed, out of those the array should take before it is rebuilt.
  uint64_t claimed() const { return claimed_; }
  uint64_t claim_limit() const { return memory_ == nullptr ? 0 : num_buckets_ * kWays * 7 / 8; }
  uint64_t memory_bytes() const { return memory_ == nullptr ? 0 : num_buckets_ * sizeof(Bucket); }

  // The way of the key, or the one where it is to be put (REQUIRES claimed() < claim_limit()). Buckets that a new key
  // has to pass are marked at once.
  Way FindOrReserve(Key key, Bucket* home);
  // The way of the key; an empty one if the key was never in this array.
  Way FindForWrite(Key key, Bucket* home) const;
  // Puts the row of `slot` (already written) in place, or marks the way as erased.
  void Publish(const Way& way, Key key, uint32_t slot);
  void Erase(const Way& way);
  Way WayAt(uint64_t bucket, size_t number) const {
    return {buckets_ + bucket, number, Load(buckets_[bucket].entries[number])};
  }

  // Calls visit(key, slot) for every row; by the writer, or by readers who do not mind rows that come and go.
  template <typename Visit>
  void ForEach(Visit visit) const {
    for (uint64_t i = 0; i < num_buckets_; ++i) VisitBucket(i, visit);
  }
  uint64_t num_buckets() const { return num_buckets_; }
  template <typename Visit>
  void VisitBucket(uint64_t i, Visit visit) const {
    for (size_t way = 0; way < kWays; ++way) {
      const uint32_t entry = Load(buckets_[i].entries[way], std::memory_order_acquire);
      if (entry != kUnclaimed && entry != kErased) visit(Load(buckets_[i].keys[way]), entry - 1);
    }
  }

 private:
  template <typename T>
  static T Load(const T& place, std::memory_order order = std::memory_order_relaxed) {
    return std::atomic_ref<T>(const_cast<T&>(place)).load(order);
  }
  template <typename T>
  static void Store(T& place, T value, std::memory_order order) {
    std::atomic_ref<T>(place).store(value, order);
  }

  // One bit for each way that holds the key.
  static uint32_t WaysOf(Key key, const Bucket& bucket) {
    uint32_t ways = 0;
    for (size_t way = 0; way < kWays; ++way) ways |= static_cast<uint32_t>(Load(bucket.keys[way]) == key) << way;
    return ways;
  }

  template <typename AnyBucket>
  AnyBucket* Next(AnyBucket* bucket) const {
    return bucket + 1 == buckets_ + num_buckets_ ? buckets_ : bucket + 1;
  }

  Bucket* const buckets_;
  const uint64_t num_buckets_;
  uint64_t claimed_ = 0;
  const std::shared_ptr<const AnonymousMemory> memory_;
};

}  // namespace hps

#endif  // HPS_STORAGE_HASH_MAP_INDEX_H_
