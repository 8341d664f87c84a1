// HashBuckets: open addressing from keys to row slots over an array of buckets that somebody else owns.
//
// A bucket is one cache line of five entries; a key that finds its bucket full goes to the next one. Hence 12.8 bytes
// an entry, and one cache line for most look-ups. The array may lie in memory that several processes share: it holds no
// addresses, and every word of it that readers look at is atomic.
//
// Invariants
// - A way is claimed once: its key is stored (relaxed), then its entry (release), and the key never changes again in
//   this array. Erasing keeps the key; only the same key may come back to the way.
// - Ways of a bucket are claimed in order, and a full bucket stays full. So a key lies in the first bucket, counted
//   from its home, that had room when it came, and every bucket it passed is marked as overflowed.
// - A writer that dies between two stores leaves an unclaimed way with some key in it, or a mark too many; both are
//   harmless.
//
// Thread safety: one writer at a time; any number of readers beside it, which neither lock nor wait. Somebody else sees
// to it that the array, and the rows of the slots, outlive the readers or that these notice.

#ifndef HPS_STORAGE_HASH_BUCKETS_H_
#define HPS_STORAGE_HASH_BUCKETS_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "cc/base/hash.h"
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

class HashBuckets {
 public:
  static constexpr size_t kWays = 5;

  // What an entry says besides slot + 1.
  static constexpr uint32_t kUnclaimed = 0;
  static constexpr uint32_t kErased = 0xFFFFFFFF;

  struct alignas(64) Bucket {
    Key keys[kWays];
    uint32_t entries[kWays];
    uint32_t marks;  // kOverflowed; the other bits belong to the owner of the array
  };
  static_assert(sizeof(Bucket) == 64);
  static constexpr uint32_t kOverflowed = 1;  // a key that belongs here may be in the next bucket

  // A bucket way: where a key is, or where it may be put.
  struct Way {
    Bucket* bucket = nullptr;
    size_t number = 0;
    uint32_t entry = kUnclaimed;  // kUnclaimed: the key was never in this array

    // The slot + 1 of the key's row, 0 if it has none.
    uint32_t row_entry() const { return entry == kErased ? 0 : entry; }
  };

  // Buckets for so many rows at the load the array is planned for (0.8).
  static uint64_t BucketsFor(uint64_t rows) { return std::max<uint64_t>((rows + 3) / 4, 2); }
  // Entries that are not kUnclaimed which an array should take before it is replaced by a larger one.
  static uint64_t ClaimLimit(uint64_t num_buckets) { return num_buckets * kWays * 7 / 8; }

  HashBuckets() = default;
  HashBuckets(Bucket* buckets, uint64_t num_buckets) : buckets_(buckets), num_buckets_(num_buckets) {}

  uint64_t num_buckets() const { return num_buckets_; }
  Bucket* bucket(uint64_t i) const { return buckets_ + i; }
  Way WayAt(uint64_t i, size_t number) const { return {buckets_ + i, number, Load(buckets_[i].entries[number])}; }

  // Readers ----------------------------------------------------------------------------------------------------------

  Bucket* Home(uint64_t fraction) const { return buckets_ + MapToRange(fraction, num_buckets_); }

  // The way of the key; an empty one if the key was never in this array.
  Way Probe(Key key, Bucket* home) const {
    Bucket* bucket = home;
    do {
      for (uint32_t ways = WaysOf(key, *bucket); ways != 0; ways &= ways - 1) {
        const size_t way = static_cast<size_t>(__builtin_ctz(ways));
        const uint32_t entry = Load(bucket->entries[way], std::memory_order_acquire);
        // The second look at the key: an unclaimed way holds key 0, and another key may have claimed it meanwhile.
        if (entry != kUnclaimed && Load(bucket->keys[way]) == key) return {bucket, way, entry};
      }
      if ((Load(bucket->marks) & kOverflowed) == 0) return {};
      bucket = Next(bucket);
    } while (bucket != home);
    return {};
  }
  // The slot + 1 of the key's row, 0 if the key is absent.
  uint32_t Find(Key key, const Bucket* home) const { return Probe(key, const_cast<Bucket*>(home)).row_entry(); }

  // Calls visit(key, slot) for every row; by the writer, or by readers who do not mind rows that come and go.
  template <typename Visit>
  void ForEach(Visit visit) const {
    for (uint64_t i = 0; i < num_buckets_; ++i) VisitBucket(i, visit);
  }
  template <typename Visit>
  void VisitBucket(uint64_t i, Visit visit) const {
    for (size_t way = 0; way < kWays; ++way) {
      const uint32_t entry = Load(buckets_[i].entries[way], std::memory_order_acquire);
      if (entry != kUnclaimed && entry != kErased) visit(Load(buckets_[i].keys[way]), entry - 1);
    }
  }

  // The writer -------------------------------------------------------------------------------------------------------

  // The way of the key, or the one where it is to be put (REQUIRES that fewer ways are claimed than there are). Buckets
  // that a new key has to pass are marked at once.
  Way FindOrReserve(Key key, Bucket* home) const {
    for (Bucket* bucket = home;; bucket = Next(bucket)) {
      for (size_t way = 0; way < kWays; ++way) {
        const uint32_t entry = Load(bucket->entries[way]);
        if (entry == kUnclaimed || Load(bucket->keys[way]) == key) return {bucket, way, entry};
      }
      const uint32_t marks = Load(bucket->marks);
      if ((marks & kOverflowed) == 0) Store(bucket->marks, marks | kOverflowed, std::memory_order_relaxed);
    }
  }
  // The way of the key; an empty one if the key was never in this array.
  Way FindForWrite(Key key, Bucket* home) const {
    Bucket* bucket = home;
    do {
      for (size_t way = 0; way < kWays; ++way) {
        const uint32_t entry = Load(bucket->entries[way]);
        if (entry == kUnclaimed) return {};
        if (Load(bucket->keys[way]) == key) return {bucket, way, entry};
      }
      if ((Load(bucket->marks) & kOverflowed) == 0) return {};
      bucket = Next(bucket);
    } while (bucket != home);
    return {};
  }
  // Puts the row of `slot` (already written) in place, or marks the way as erased.
  static void SetRow(const Way& way, Key key, uint32_t slot) {
    if (way.entry == kUnclaimed) Store(way.bucket->keys[way.number], key, std::memory_order_relaxed);
    Store(way.bucket->entries[way.number], slot + 1, std::memory_order_release);
  }
  static void Erase(const Way& way) { Store(way.bucket->entries[way.number], kErased, std::memory_order_release); }

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

  Bucket* Next(Bucket* bucket) const { return bucket + 1 == buckets_ + num_buckets_ ? buckets_ : bucket + 1; }

  Bucket* buckets_ = nullptr;
  uint64_t num_buckets_ = 0;
};

}  // namespace hps

#endif  // HPS_STORAGE_HASH_BUCKETS_H_
