// StaticPlacement: where each key of a table that must be resident as a whole lies in the buckets of its cache.
//
// A key may lie in either of its two buckets of seven rows. Built on the host, keys move between their two (cuckoo
// hashing), which holds any table up to a load of 0.97 and more, where inserting on the device loses rows from 0.6 on.
// Most keys lie in their first bucket; those in the second mark the first as overflowed, so that lookups go on there.
//
// Memory: 64 bytes a bucket, 9.6 bytes a key at a load of 0.95, until the buckets have been uploaded.
// Thread safety: none; one builder.

#ifndef HPS_CACHE_STATIC_PLACEMENT_H_
#define HPS_CACHE_STATIC_PLACEMENT_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cuda_kernels/cache_bucket.h"
#include "hps/status.h"
#include "hps/table_store.h"

namespace hps {

class StaticPlacement {
 public:
  // The load that BucketsFor plans with.
  static constexpr double kLoad = 0.95;
  // Buckets for so many rows; the cache takes 64 + 7 * row_bytes bytes for each.
  static uint64_t BucketsFor(uint64_t rows);

  // `name` ("model 'm', table 't'") goes into messages. num_buckets >= 16.
  StaticPlacement(std::string name, uint64_t num_buckets);

  // Places more keys; one that is there already is ignored. kResourceExhausted where a key finds no place: it says how
  // many were placed and what to do. The keys placed before stay.
  Status Add(std::span<const Key> keys);

  // Marks what lies in second buckets. No Add afterwards.
  const std::vector<cuda::CacheBucket>& Finish();

  // Where a key lies: way + 7 * bucket; nothing where it was not placed.
  std::optional<uint64_t> SlotOf(Key key) const;
  bool Contains(Key key) const { return SlotOf(key).has_value(); }
  // The key there; nothing where the place is free.
  std::optional<Key> KeyAt(uint64_t slot) const;
  uint64_t slots() const { return buckets_.size() * cuda::kCacheWays; }
  uint64_t rows() const { return rows_; }
  uint64_t rows_in_second() const { return rows_in_second_; }  // after Finish
  double load() const { return static_cast<double>(rows_) / static_cast<double>(buckets_.size() * cuda::kCacheWays); }

 private:
  struct Step {
    uint64_t bucket;
    int64_t from;  // index of the step it was reached from, -1: the key's own bucket
    int way;       // of the key in that step's bucket that may move here
  };

  int FreeWay(uint64_t bucket) const;
  bool Holds(uint64_t bucket, Key key) const;
  void Put(uint64_t bucket, int way, Key key);
  uint64_t OtherBucket(Key key, uint64_t bucket) const;
  bool MakeRoom(uint64_t first, uint64_t second, Key key);
  Status NoPlace(Key key) const;

  const std::string name_;
  std::vector<cuda::CacheBucket> buckets_;
  std::vector<Step> steps_;  // MakeRoom's
  uint64_t rows_ = 0;
  uint64_t rows_in_second_ = 0;
};

}  // namespace hps

#endif  // HPS_CACHE_STATIC_PLACEMENT_H_
